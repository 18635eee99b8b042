//! `ComponentStatus`: never stored; the server asks the components when a client asks for it.

use jiff::Timestamp;
use serde_json::Value;

use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Strategy, SubresourceHandler};

pub struct ComponentStatus;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Status", "string"),
    Column::new("Message", "string"),
    Column::new("Error", "string"),
];

impl Strategy for ComponentStatus {
    fn answers_read(&self) -> Option<&'static dyn SubresourceHandler> {
        Some(&crate::http::component_status::Components)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, _now: Timestamp) -> Vec<Value> {
        let healthy = obj.list_at(&["conditions"]).iter().find(|c| c["type"] == "Healthy");
        let (status, message, error) = match healthy {
            Some(c) if c["status"] == "True" => ("Healthy", c.str_at(&["message"]), c.str_at(&["error"])),
            Some(c) => ("Unhealthy", c.str_at(&["message"]), c.str_at(&["error"])),
            None => ("Unknown", "", ""),
        };
        vec![obj.name().into(), status.into(), message.into(), error.into()]
    }
}
