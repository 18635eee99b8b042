//! The `storage.k8s.io` group: classes of storage, drivers, and volumes attached to nodes.

use serde_json::Value;

use super::common::{ALL_METADATA, StatusOf};
use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::{Column, NameRule};
use super::tables::{NONE, UNSET, age, count, flag, name, scalar, text, text_or};
use super::{defaults, validation};

pub static STORAGE_CLASS: Declared = Declared::new(Shape::Plain)
    .defaults(defaults::storage::storage_class)
    .rules(validation::storage_classes::storage_class)
    .update_rules(validation::storage_classes::storage_class_update)
    .table(
        &[
            Column::name(),
            Column::new("Provisioner", "string"),
            Column::new("ReclaimPolicy", "string"),
            Column::new("VolumeBindingMode", "string"),
            Column::new("AllowVolumeExpansion", "string"),
            Column::age(),
        ],
        |obj, now| {
            // Only one class can be the default; which of several it is shows when a claim is made.
            let is_default = obj.annotation("storageclass.kubernetes.io/is-default-class") == Some("true");
            let shown = if is_default { format!("{} (default)", obj.name()) } else { obj.name().to_owned() };
            vec![
                shown.into(),
                text(obj, &["provisioner"]),
                text_or(obj, &["reclaimPolicy"], "Delete"),
                text_or(obj, &["volumeBindingMode"], "Immediate"),
                flag(obj, &["allowVolumeExpansion"]),
                age(obj, now),
            ]
        },
    );

pub static VOLUME_ATTRIBUTES_CLASS: Declared = Declared::new(Shape::Plain)
    .rules(validation::storage_classes::volume_attributes_class)
    .update_rules(validation::storage_classes::volume_attributes_class_update)
    .table(&[Column::name(), Column::new("DriverName", "string"), Column::age()], |obj, now| {
        vec![name(obj), text(obj, &["driverName"]), age(obj, now)]
    });

static ATTACHMENT_STATUS: StatusOf = StatusOf::new()
    .keeping(ALL_METADATA)
    .resetting(&[&["metadata"], &["spec"]])
    .validated(|obj, _| validation::storage_classes::volume_attachment(obj));

pub static VOLUME_ATTACHMENT: Declared = Declared::new(Shape::WithStatus)
    .defaults(attached)
    .status(&ATTACHMENT_STATUS)
    .rules(validation::storage_classes::volume_attachment)
    .update_rules(validation::storage_classes::volume_attachment_update)
    .table(
        &[
            Column::name(),
            Column { format: "name", ..Column::new("Attacher", "string") },
            Column::new("PV", "string"),
            Column::new("Node", "string"),
            Column::new("Attached", "boolean"),
            Column::age(),
        ],
        |obj, now| {
            vec![
                name(obj),
                text(obj, &["spec", "attacher"]),
                text(obj, &["spec", "source", "persistentVolumeName"]),
                text(obj, &["spec", "nodeName"]),
                flag(obj, &["status", "attached"]),
                age(obj, now),
            ]
        },
    );

fn attached(obj: &mut Value) {
    if obj["status"].is_object() {
        obj.set_default(&["status", "attached"], false);
    }
}

pub static CSI_NODE: Declared = Declared::new(Shape::Plain)
    .updated_by_version()
    .rules(validation::storage_classes::csi_node)
    .update_rules(validation::storage_classes::csi_node_update)
    .table(&[Column::name(), Column::new("Drivers", "integer"), Column::age()], |obj, now| {
        vec![name(obj), count(&obj["spec"]["drivers"]).into(), age(obj, now)]
    });

pub static CSI_DRIVER: Declared = Declared::new(Shape::CountedLater)
    .defaults(defaults::storage::csi_driver)
    .updated_by_version()
    .rules(validation::storage_classes::csi_driver)
    .warned_when_new(validation::storage_classes::csi_driver_warnings)
    .update_rules(validation::storage_classes::csi_driver_update)
    .table(
        &[
            Column::name(),
            Column::new("AttachRequired", "boolean"),
            Column::new("PodInfoOnMount", "boolean"),
            Column::new("StorageCapacity", "boolean"),
            Column::new("TokenRequests", "string"),
            Column::new("RequiresRepublish", "boolean"),
            Column::new("Modes", "string"),
            Column::age(),
        ],
        |obj, now| {
            let spec = &obj["spec"];
            let audiences: Vec<&str> =
                spec.list_at(&["tokenRequests"]).iter().map(|t| t.str_at(&["audience"])).collect();
            let modes: Vec<String> = spec.list_at(&["volumeLifecycleModes"]).iter().map(scalar).collect();
            vec![
                name(obj),
                obj.bool_at(&["spec", "attachRequired"]).unwrap_or(true).into(),
                flag(obj, &["spec", "podInfoOnMount"]),
                flag(obj, &["spec", "storageCapacity"]),
                if spec["tokenRequests"].is_null() { UNSET.into() } else { audiences.join(",").into() },
                flag(obj, &["spec", "requiresRepublish"]),
                if modes.is_empty() { NONE.into() } else { modes.join(",").into() },
                age(obj, now),
            ]
        },
    );

pub static CSI_STORAGE_CAPACITY: Declared = Declared::new(Shape::Plain)
    .named(NameRule::Dns1123Subdomain)
    .updated_by_version()
    .rules(validation::storage_classes::csi_storage_capacity)
    .update_rules(validation::storage_classes::csi_storage_capacity_update)
    .table(&[Column::name(), Column::new("Created At", "date")], |obj, _| {
        vec![name(obj), obj.str_at(&["metadata", "creationTimestamp"]).into()]
    });
