//! Strategic merge and apply without lists' keys and field ownership, in the shape that `apimachinery::merge` has for
//! the real ones.

use apimachinery::schema::Schema;
use serde_json::Value;

pub fn strategic(_schema: &Schema, object: &mut Value, patch: &Value) -> Result<(), apimachinery::merge::PatchError> {
    apimachinery::merge::merge_patch(object, patch);
    Ok(())
}

pub mod apply {
    use super::{Schema, Value};
    use apimachinery::status::Status;

    pub struct Manager {
        pub name: String,
        pub api_version: String,
        pub subresource: String,
        pub time: String,
    }

    #[derive(Debug)]
    pub struct ApplyError;

    impl ApplyError {
        pub fn to_status(&self) -> Status {
            Status::failure(409, "Conflict", "apply failed")
        }
    }

    pub fn apply(
        _schema: &Schema,
        live: Option<&Value>,
        config: &Value,
        _manager: &Manager,
        _force: bool,
        _reset: &[&[&str]],
    ) -> Result<Value, ApplyError> {
        let mut object = live.cloned().unwrap_or_else(|| serde_json::json!({}));
        apimachinery::merge::merge_patch(&mut object, config);
        Ok(object)
    }

    pub fn update_managed_fields(_: &Schema, _: Option<&Value>, _: &mut Value, _: &Manager, _: &[&[&str]]) {}
}
