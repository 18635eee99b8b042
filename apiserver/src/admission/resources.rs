//! Sums of resource quantities: what the containers of a pod ask for together. Shared by limit ranges and quotas.

use std::collections::BTreeMap;

use apimachinery::meta::Quantity;
use serde_json::Value;

use crate::registry::object::ObjectExt;

/// Quantities by resource name.
pub type Resources = BTreeMap<String, Quantity>;

/// The quantities of a map such as `resources.requests`; what is no quantity is left out, as validation refuses it.
pub fn parse(map: Option<&Value>) -> Resources {
    let entries = map.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(name, value)| Some((name.clone(), quantity(value)?))).collect()
}

fn quantity(value: &Value) -> Option<Quantity> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

/// Adds `other` to `sum`.
pub fn add(sum: &mut Resources, other: &Resources) {
    for (name, value) in other {
        let total = sum.get(name).map_or(*value, |known| known.add(*value));
        sum.insert(name.clone(), total);
    }
}

/// Raises `most` to what `other` has more of.
fn raise(most: &mut Resources, other: &Resources) {
    for (name, value) in other {
        if most.get(name).is_none_or(|known| value > known) {
            most.insert(name.clone(), *value);
        }
    }
}

/// `requests` or `limits` of the whole pod: containers run side by side, init containers one after the other, sidecars
/// stay; values for the pod as a whole win.
pub fn of_pod(pod: &Value, kind: &str) -> Resources {
    let of = |container: &Value| parse(container.at(&["resources", kind]));
    let mut sum = Resources::new();
    for container in pod.list_at(&["spec", "containers"]) {
        add(&mut sum, &of(container));
    }
    let (mut sidecars, mut starting) = (Resources::new(), Resources::new());
    for container in pod.list_at(&["spec", "initContainers"]) {
        let mut own = of(container);
        if container.str_at(&["restartPolicy"]) == "Always" {
            add(&mut sum, &own);
            add(&mut sidecars, &own);
            own = sidecars.clone();
        } else {
            add(&mut own, &sidecars);
        }
        raise(&mut starting, &own);
    }
    raise(&mut sum, &starting);
    for (name, value) in parse(pod.at(&["spec", "resources", kind])) {
        if matches!(name.as_str(), "cpu" | "memory") {
            sum.insert(name, value);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn init_containers_count_by_their_peak() {
        let container = |cpu: &str| json!({"resources": {"requests": {"cpu": cpu}}});
        let mut sidecar = container("100m");
        sidecar["restartPolicy"] = "Always".into();
        let pod = json!({"spec": {"containers": [container("200m"), container("300m")], "initContainers": [sidecar, container("1")]}});
        assert_eq!(of_pod(&pod, "requests")["cpu"].to_string(), "1100m");
        let pod = json!({"spec": {"containers": [container("2")], "initContainers": [container("1")]}});
        assert_eq!(of_pod(&pod, "requests")["cpu"].to_string(), "2");
    }
}
