//! `HorizontalPodAutoscaler`: scales a workload by metrics. Stored as `autoscaling/v2`; `v1` is a view of it.

use apimachinery::status::{FieldError, Result};
use jiff::Timestamp;
use serde_json::Value;

use super::conversion;
use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::autoscaling::targets;
use crate::registry::tables::{UNSET, age, name, number, scalar};
use crate::registry::{defaults, validation};

pub struct HorizontalPodAutoscaler;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Reference", "string"),
    Column::new("Targets", "string"),
    Column::new("MinPods", "string"),
    Column::new("MaxPods", "string"),
    Column::new("Replicas", "string"),
    Column::age(),
];

static STATUS: StatusOf = StatusOf::new().validated(|obj, _| validation::autoscaling::status(obj));

impl Strategy for HorizontalPodAutoscaler {
    fn default(&self, obj: &mut Value) {
        defaults::autoscaling::horizontal_pod_autoscaler(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
        obj["status"]["desiredReplicas"] = 0.into();
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::autoscaling::horizontal_pod_autoscaler(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::autoscaling::horizontal_pod_autoscaler(obj)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        // Rows are made of objects as they are served; the older version has its metrics elsewhere.
        let newer;
        let obj = if obj["apiVersion"] == "autoscaling/v1" {
            newer = conversion::from_v1(obj.clone());
            &newer
        } else {
            obj
        };
        let target = &obj["spec"]["scaleTargetRef"];
        let minimum = &obj["spec"]["minReplicas"];
        vec![
            name(obj),
            format!("{}/{}", target.str_at(&["kind"]), target.str_at(&["name"])).into(),
            targets(obj).into(),
            if minimum.is_null() { UNSET.into() } else { scalar(minimum).into() },
            number(obj, &["spec", "maxReplicas"]),
            number(obj, &["status", "currentReplicas"]),
            age(obj, now),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }

    fn to_storage(&self, _version: &str, obj: Value) -> Result<Value> {
        Ok(conversion::from_v1(obj))
    }

    fn from_storage(&self, _version: &str, obj: Value) -> Result<Value> {
        Ok(conversion::to_v1(obj))
    }
}
