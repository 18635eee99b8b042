//! `ServiceAccount`: whom pods act as. Tokens are minted by the `token` subresource, which belongs to authentication.

use jiff::Timestamp;
use serde_json::Value;

use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{age, name};

pub struct ServiceAccount;

const COLUMNS: &[Column] = &[Column::name(), Column::age()];

impl Strategy for ServiceAccount {
    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![name(obj), age(obj, now)]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "token").then_some(Subresource::Custom(&crate::auth::token_request::TOKEN_REQUEST))
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}
