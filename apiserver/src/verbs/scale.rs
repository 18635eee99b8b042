//! The `scale` subresource: one replica count of many kinds, seen and changed as an `autoscaling/v1 Scale`.

use apimachinery::merge::{apply, scale};
use apimachinery::meta::{GroupKind, LabelSelector};
use apimachinery::schema::builtin;
use apimachinery::status::{FieldError, Result, Status};
use serde_json::{Value, json};

use super::update::{self, Made};
use super::{Call, Written};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{ScalePaths, ScaleSelector};

/// The scale of `object`.
pub fn of(object: &Value, paths: &ScalePaths<'_>) -> Value {
    let mut metadata = json!({});
    for name in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object.at(&["metadata", name]) {
            metadata.set(&[name], value.clone());
        }
    }
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": metadata,
        "spec": {},
        "status": {"replicas": object.i64_at(paths.status_replicas).unwrap_or(0)},
    });
    if let Some(replicas) = object.i64_at(paths.spec_replicas) {
        scale.set(&["spec", "replicas"], replicas);
    }
    let selector = selector(object, paths.selector);
    if !selector.is_empty() {
        scale.set(&["status", "selector"], selector);
    }
    scale
}

fn selector(object: &Value, selector: ScaleSelector<'_>) -> String {
    match selector {
        ScaleSelector::Text(path) => object.str_at(path).to_owned(),
        ScaleSelector::Labels(path) => {
            object.at(path).map(|labels| LabelSelector::from_map(labels).to_string()).unwrap_or_default()
        }
        ScaleSelector::Selector(path) => object
            .at(path)
            .and_then(|selector| LabelSelector::from_json(selector).ok())
            .map(|selector| selector.to_string())
            .unwrap_or_default(),
    }
}

/// Sets the replica count that `scale_of` makes of the present scale.
pub async fn change(
    call: &Call<'_>,
    paths: &ScalePaths<'_>,
    scale_of: &mut (dyn FnMut(Value) -> Result<Value> + Send),
) -> Result<Written> {
    let mut written = update::change(call, &mut |old| {
        let old = old.ok_or_else(|| call.not_found(&call.name))?;
        let scale = scale_of(of(old, paths))?;
        let mut object = old.clone();
        object.set(paths.spec_replicas, replicas(call, &scale)?);
        for name in ["resourceVersion", "uid"] {
            match scale.at(&["metadata", name]) {
                Some(value) => object.metadata_mut().insert(name.into(), value.clone()),
                None => object.metadata_mut().remove(name),
            };
        }
        Ok(Made { object, managed: false })
    })
    .await?;
    written.object = of(&written.object, paths);
    Ok(written)
}

/// The count that a scale wants.
fn replicas(call: &Call<'_>, scale: &Value) -> Result<i64> {
    let replicas = scale.i64_at(&["spec", "replicas"]).unwrap_or(0);
    if replicas >= 0 {
        return Ok(replicas);
    }
    let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
    Err(Status::invalid(&GroupKind::new("autoscaling", "Scale"), &call.name, &[error]))
}

/// Applies `config` to the scale: its owners of the count are those of the object.
pub async fn apply(call: &Call<'_>, paths: &ScalePaths<'_>, config: &Value) -> Result<Written> {
    const KIND: &str = "Scale";
    const API_VERSION: &str = "autoscaling/v1";
    if config.kind() != KIND {
        return Err(Status::bad_request(format!(
            "invalid object type: {}, Kind={}",
            config.api_version(),
            config.kind()
        )));
    }
    let Some(schema) = builtin().kind_of("autoscaling", "v1", KIND) else {
        return Err(Status::internal("the schema of scales is missing"));
    };
    let manager = apply::Manager {
        name: &call.options.field_manager,
        api_version: API_VERSION,
        subresource: &call.subresource,
        time: jiff::Timestamp::now(),
    };
    let api_version = call.served.gvk.api_version();
    let unreadable = |error| Status::internal(apimachinery::process::error_chain(&error));
    let mut written = update::change(call, &mut |old| {
        let old = old.ok_or_else(|| call.not_found(&call.name))?;
        let owners = old.at(&["metadata", "managedFields"]).cloned().unwrap_or_default();
        let mut live = of(old, paths);
        live.set(&["metadata", "managedFields"], scale::to_scale(&owners, paths.spec_replicas).map_err(unreadable)?);
        let mut applied = apply::apply(schema, Some(&live), config, &manager, call.options.force, &[])?;
        let of_scale = applied.remove_at(&["metadata", "managedFields"]).unwrap_or_default();
        let owners = scale::to_object(&owners, &of_scale, paths.spec_replicas, &api_version).map_err(unreadable)?;
        let mut object = old.clone();
        object.set(paths.spec_replicas, replicas(call, &applied)?);
        object.set(&["metadata", "managedFields"], owners);
        Ok(Made { object, managed: true })
    })
    .await?;
    written.object = of(&written.object, paths);
    Ok(written)
}
