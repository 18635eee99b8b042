//! Names that Go's types have and the table of facts does not: structs inside structs, whose fields JSON shows as the
//! outer one's, and the types of lists' items that are texts with a name. Only the messages about bodies that cannot be
//! decoded need them.

use super::{Field, Object, Shape};

/// The struct that stands at a protobuf number inside another one.
const EMBEDDED: &[(&str, u16, &str)] = &[
    ("ConfigMapEnvSource", 1, "LocalObjectReference"),
    ("ConfigMapKeySelector", 1, "LocalObjectReference"),
    ("ConfigMapProjection", 1, "LocalObjectReference"),
    ("ConfigMapVolumeSource", 1, "LocalObjectReference"),
    ("DeviceAllocationConfiguration", 3, "DeviceConfiguration"),
    ("DeviceClaimConfiguration", 2, "DeviceConfiguration"),
    ("DeviceClassConfiguration", 1, "DeviceConfiguration"),
    ("EphemeralContainer", 1, "EphemeralContainerCommon"),
    ("IngressRule", 2, "IngressRuleValue"),
    ("NamedRuleWithOperations", 2, "RuleWithOperations"),
    ("PersistentVolumeSpec", 2, "PersistentVolumeSource"),
    ("Probe", 1, "ProbeHandler"),
    ("RuleWithOperations", 2, "Rule"),
    ("SecretEnvSource", 1, "LocalObjectReference"),
    ("SecretKeySelector", 1, "LocalObjectReference"),
    ("SecretProjection", 1, "LocalObjectReference"),
    ("Volume", 2, "VolumeSource"),
];

/// The type of a list's items; of the holder's own package where it has none.
const ITEMS: &[(&str, &str, &str)] = &[
    ("CSIDriverSpec", "volumeLifecycleModes", "VolumeLifecycleMode"),
    ("Capabilities", "add", "Capability"),
    ("Capabilities", "drop", "Capability"),
    ("CertificateSigningRequestSpec", "usages", "KeyUsage"),
    ("DeviceRequestAllocationResult", "skipNodeOperations", "SkipNodeOperation"),
    ("NamespaceSpec", "finalizers", "FinalizerName"),
    ("NetworkPolicySpec", "policyTypes", "PolicyType"),
    ("NodeStatus", "volumesInUse", "UniqueVolumeName"),
    ("PersistentVolumeClaimSpec", "accessModes", "PersistentVolumeAccessMode"),
    ("PersistentVolumeClaimStatus", "accessModes", "PersistentVolumeAccessMode"),
    ("PersistentVolumeSpec", "accessModes", "PersistentVolumeAccessMode"),
    ("ResourceQuotaSpec", "scopes", "ResourceQuotaScope"),
    ("ResourceSliceSpec", "skipNodeOperations", "SkipNodeOperation"),
    ("RuleWithOperations", "operations", "OperationType"),
    ("ServiceSpec", "ipFamilies", "IPFamily"),
    ("UncountedTerminatedPods", "failed", "types.UID"),
    ("UncountedTerminatedPods", "succeeded", "types.UID"),
    ("ValidatingAdmissionPolicyBindingSpec", "validationActions", "ValidationAction"),
];

/// Without the package.
pub fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The structs between an object and a field that JSON shows as its own, outermost first.
pub fn embedded(object: &Object, field: &Field) -> Vec<&'static str> {
    if matches!(&*field.name, "kind" | "apiVersion") && field.numbers[0] == 0 && object.field("metadata").is_some() {
        return vec!["TypeMeta"];
    }
    let mut holder = short(&object.name);
    let mut names = Vec::new();
    // The last number is the field's own.
    let outer = field.numbers.iter().zip(&field.numbers[1..]).filter(|(_, next)| **next > 0);
    for (number, _) in outer {
        let Some((.., name)) = EMBEDDED.iter().find(|(known, at, _)| *known == holder && at == number) else { break };
        names.push(*name);
        holder = name;
    }
    names
}

/// Go's name for the items of a list.
pub fn item(object: &Object, field: &Field) -> Option<String> {
    if !matches!(field.schema.shape, Shape::List(_)) {
        return None;
    }
    let (package, holder) = object.name.rsplit_once('.')?;
    let (.., name) = ITEMS.iter().find(|(known, json, _)| *known == holder && *json == &*field.name)?;
    Some(if name.contains('.') { (*name).to_owned() } else { format!("{package}.{name}") })
}

#[cfg(test)]
mod tests {
    use super::super::builtin;
    use super::*;

    #[test]
    fn fields_are_found_in_the_structs_that_hold_them() {
        let object = |name: &str| builtin().named(name).and_then(|schema| schema.as_object()).expect("a struct");
        let cases = [
            ("io.k8s.api.core.v1.Volume", "secret", vec!["VolumeSource"]),
            ("io.k8s.api.core.v1.Volume", "name", vec![]),
            ("io.k8s.api.core.v1.ConfigMapKeySelector", "name", vec!["LocalObjectReference"]),
            (
                "io.k8s.api.admissionregistration.v1.NamedRuleWithOperations",
                "apiGroups",
                vec!["RuleWithOperations", "Rule"],
            ),
            ("io.k8s.api.core.v1.PersistentVolumeClaim", "kind", vec!["TypeMeta"]),
        ];
        for (name, field, expected) in cases {
            let object = object(name);
            let field = object.field(field).expect("a field");
            assert_eq!(embedded(object, field), expected, "{name}");
        }
        let namespace = object("io.k8s.api.core.v1.NamespaceSpec");
        let finalizers = namespace.field("finalizers").expect("a field");
        assert_eq!(item(namespace, finalizers).as_deref(), Some("v1.FinalizerName"));
    }
}
