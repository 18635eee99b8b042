//! Defaults of storage classes and CSI drivers.

use serde_json::{Value, json};

use super::{default, default_zero, within};

pub fn storage_class(obj: &mut Value) {
    default(obj, "reclaimPolicy", "Delete");
    default(obj, "volumeBindingMode", "Immediate");
}

pub fn csi_driver(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default(spec, "attachRequired", true);
        default(spec, "podInfoOnMount", false);
        default(spec, "storageCapacity", false);
        default(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
        default_zero(spec, "volumeLifecycleModes", json!(["Persistent"]));
        default(spec, "requiresRepublish", false);
        default(spec, "seLinuxMount", false);
        default(spec, "preventPodSchedulingIfMissing", false);
    });
}
