//! `PersistentVolume`: storage that outlives pods.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::registry::common::{self, keep_metadata};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource, keep};
use crate::registry::tables::{UNSET, access_modes, age, name, text, text_or};
use crate::registry::{defaults, validation};

pub struct PersistentVolume;

struct Status;

/// What older manifests name the storage class with.
const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Capacity", "string"),
    Column::new("Access Modes", "string"),
    Column::new("Reclaim Policy", "string"),
    Column::new("Status", "string"),
    Column::new("Claim", "string"),
    Column::new("StorageClass", "string"),
    Column::new("VolumeAttributesClass", "string"),
    Column::new("Reason", "string"),
    Column::age(),
    Column::new("VolumeMode", "string").wide(),
];

static STATUS: Status = Status;

/// The storage class of a volume or claim.
pub fn storage_class(obj: &Value) -> Value {
    match obj.annotation(CLASS_ANNOTATION) {
        Some(class) => class.into(),
        None => text(obj, &["spec", "storageClassName"]),
    }
}

impl Strategy for PersistentVolume {
    fn default(&self, obj: &mut Value) {
        defaults::core::persistent_volume(obj);
    }

    fn prepare_for_create(&self, cx: &Cx<'_>, obj: &mut Value) {
        let now = cx.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        obj.set(&["status"], json!({"phase": "Pending", "lastPhaseTransitionTime": now}));
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::persistent_volume::volume(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::persistent_volume::update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        validation::warnings::persistent_volume(obj)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let claim = match &obj["spec"]["claimRef"] {
            Value::Null => String::new(),
            claim => format!("{}/{}", claim.str_at(&["namespace"]), claim.str_at(&["name"])),
        };
        vec![
            name(obj),
            text_or(obj, &["spec", "capacity", "storage"], "0"),
            access_modes(&obj["spec"]["accessModes"]).into(),
            text(obj, &["spec", "persistentVolumeReclaimPolicy"]),
            phase(obj),
            claim.into(),
            storage_class(obj),
            text_or(obj, &["spec", "volumeAttributesClassName"], UNSET),
            text(obj, &["status", "reason"]),
            age(obj, now),
            text_or(obj, &["spec", "volumeMode"], UNSET),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}

/// The phase of a volume or claim; what is being deleted says so.
pub fn phase(obj: &Value) -> Value {
    if obj.is_being_deleted() { "Terminating".into() } else { text(obj, &["status", "phase"]) }
}

impl Strategy for Status {
    /// The time of the last change of phase is the server's to write.
    fn prepare_for_update(&self, cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        const TIME: [&str; 2] = ["status", "lastPhaseTransitionTime"];
        keep(obj, old, "spec");
        keep_metadata(obj, old, &["deletionTimestamp"]);
        let (given, stored) = (obj.at(&TIME).cloned().unwrap_or_default(), old.at(&TIME).cloned().unwrap_or_default());
        if obj["status"]["phase"] != old["status"]["phase"] {
            if given.is_null() || given == stored {
                obj.set(&TIME, cx.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
            }
        } else if given.is_null() && !stored.is_null() {
            obj.set(&TIME, stored);
        }
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["spec"]]
    }
}
