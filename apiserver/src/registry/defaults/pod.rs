//! Defaults of pods and of the pod template inside every workload kind. `pod` adds what only a `Pod` object gets:
//! templates keep what the user wrote, so that a newer server's defaults do not look like a change of the template.

use apimachinery::meta::Quantity;
use serde_json::{Value, json};

use super::{default, default_entries, default_zero, each, existing, is_zero, volume, within};

/// The three lists of containers in a pod spec.
pub const CONTAINER_LISTS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

/// A `Pod` object.
pub fn pod(obj: &mut Value) {
    within(obj, "spec", |spec| {
        if spec["terminationGracePeriodSeconds"].as_i64().is_some_and(|s| s < 0) {
            spec["terminationGracePeriodSeconds"] = json!(1);
        }
        let host_network = spec["hostNetwork"] == true;
        for list in ["containers", "initContainers"] {
            each(spec, list, |container| {
                existing(container, "resources", |resources| default_entries(resources, "requests", "limits"));
                if host_network {
                    each(container, "ports", |port| {
                        let number = port["containerPort"].clone();
                        default_zero(port, "hostPort", number);
                    });
                }
            });
        }
        default(spec, "enableServiceLinks", true);
        pod_spec(spec);
    });
    pod_status(obj);
}

/// A `PodTemplate` object, or the object that holds the template of a workload under `spec`.
pub fn template_of(holder: &mut Value) {
    existing(holder, "template", |template| {
        within(template, "metadata", |_| {});
        within(template, "spec", pod_spec);
    });
}

/// Keeps `podIP` and `podIPs`, and `hostIP` and `hostIPs`, telling the same story; the singular field wins.
pub fn pod_status(obj: &mut Value) {
    existing(obj, "status", |status| {
        let (ip, first) = (status["podIP"].clone(), status["podIPs"][0]["ip"].clone());
        match (is_zero(&ip), is_zero(&first)) {
            (false, _) if ip != first => status["podIPs"] = json!([{ "ip": ip }]),
            (true, false) => status["podIP"] = first,
            _ => {}
        }
    });
}

/// A pod spec, wherever it stands.
pub fn pod_spec(spec: &mut Value) {
    // The deprecated name of the service account stays in step with the one in use.
    if is_zero(&spec["serviceAccountName"]) {
        let old_name = spec["serviceAccount"].clone();
        if !is_zero(&old_name) {
            spec["serviceAccountName"] = old_name;
        }
    } else {
        spec["serviceAccount"] = spec["serviceAccountName"].clone();
    }
    default_zero(spec, "dnsPolicy", "ClusterFirst");
    default_zero(spec, "restartPolicy", "Always");
    within(spec, "securityContext", |_| {});
    default(spec, "terminationGracePeriodSeconds", 30);
    default_zero(spec, "schedulerName", "default-scheduler");
    each(spec, "volumes", volume::volume);
    for list in CONTAINER_LISTS {
        each(spec, list, container);
    }
    existing(spec, "resources", resource_requirements);
    resource_list(spec, "overhead");
}

/// One container of any of the three lists.
pub fn container(container: &mut Value) {
    let policy = if pulls_always(container["image"].as_str().unwrap_or_default()) { "Always" } else { "IfNotPresent" };
    default_zero(container, "imagePullPolicy", policy);
    default_zero(container, "terminationMessagePath", "/dev/termination-log");
    default_zero(container, "terminationMessagePolicy", "File");
    within(container, "resources", resource_requirements);
    each(container, "ports", |port| default_zero(port, "protocol", "TCP"));
    each(container, "env", |env| {
        existing(env, "valueFrom", |from| {
            existing(from, "fieldRef", |field| default_zero(field, "apiVersion", "v1"));
            existing(from, "fileKeyRef", |file| default(file, "optional", false));
        });
    });
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        existing(container, name, probe);
    }
    existing(container, "lifecycle", |lifecycle| {
        for hook in ["postStart", "preStop"] {
            existing(lifecycle, hook, |handler| existing(handler, "httpGet", http_get));
        }
    });
}

fn probe(probe: &mut Value) {
    default_zero(probe, "timeoutSeconds", 1);
    default_zero(probe, "periodSeconds", 10);
    default_zero(probe, "successThreshold", 1);
    default_zero(probe, "failureThreshold", 3);
    existing(probe, "httpGet", http_get);
    existing(probe, "grpc", |grpc| default(grpc, "service", ""));
}

fn http_get(action: &mut Value) {
    default_zero(action, "path", "/");
    default_zero(action, "scheme", "HTTP");
}

/// Limits and requests of anything that has them.
pub fn resource_requirements(requirements: &mut Value) {
    resource_list(requirements, "limits");
    resource_list(requirements, "requests");
}

/// Rounds the quantities of a resource list up to milli-units, the finest that upstream stores.
pub fn resource_list(obj: &mut Value, key: &str) {
    let Some(list) = obj.get_mut(key).and_then(Value::as_object_mut) else { return };
    for quantity in list.values_mut() {
        if let Some(rounded) = quantity.as_str().and_then(round_up_to_milli) {
            *quantity = Value::String(rounded);
        }
    }
}

/// The canonical form of the quantity, no finer than milli. What is no quantity is for validation to name.
fn round_up_to_milli(text: &str) -> Option<String> {
    let quantity: Quantity = text.parse().ok()?;
    let rounded = Quantity::from_milli(quantity.milli_value());
    Some(if quantity > Quantity::ZERO && rounded > quantity { rounded } else { quantity }.to_string())
}

/// Longer names of images cannot be read.
const NAME_MAX: usize = 255;

/// Whether an image is named by the moving tag `latest`, said or implied. A digest without a tag never moves.
pub fn pulls_always(image: &str) -> bool {
    let (name, digest) = match image.split_once('@') {
        Some((name, _)) => (name, true),
        None => (image, false),
    };
    let last = name.rsplit('/').next().unwrap_or_default();
    match last.split_once(':') {
        Some((_, tag)) => tag == "latest",
        // An unreadable reference counts as a fixed one, validation has its say about it.
        None => {
            let readable = name.len() <= NAME_MAX && !name.bytes().any(|b| b.is_ascii_uppercase() || b == b' ');
            !digest && !last.is_empty() && readable
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_pod_becomes_what_upstream_stores() {
        let mut obj = json!({"metadata": {"name": "web"}, "spec": {"containers": [{"name": "c", "image": "nginx"}]}});
        pod(&mut obj);
        let expected = json!({
            "containers": [{
                "name": "c", "image": "nginx", "imagePullPolicy": "Always", "resources": {},
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
            }],
            "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "restartPolicy": "Always",
            "schedulerName": "default-scheduler", "securityContext": {}, "terminationGracePeriodSeconds": 30,
        });
        assert_eq!(obj["spec"], expected);
        let once = obj.clone();
        pod(&mut obj);
        assert_eq!(obj, once, "defaulting is idempotent");
    }

    #[test]
    fn requests_follow_limits_in_pods_but_not_in_templates() {
        let spec = json!({"containers": [{"name": "c", "image": "a:1", "resources": {"limits": {"cpu": "1"}}}]});
        let mut object = json!({"spec": spec});
        pod(&mut object);
        assert_eq!(
            object["spec"]["containers"][0]["resources"],
            json!({"limits": {"cpu": "1"}, "requests": {"cpu": "1"}})
        );
        let mut holder = json!({"template": {"spec": spec}});
        template_of(&mut holder);
        assert_eq!(holder["template"]["spec"]["containers"][0]["resources"], json!({"limits": {"cpu": "1"}}));
    }

    #[test]
    fn host_network_publishes_container_ports() {
        let mut obj = json!({"spec": {"hostNetwork": true, "containers": [{"ports": [{"containerPort": 80}]}]}});
        pod(&mut obj);
        let port = json!({"containerPort": 80, "hostPort": 80, "protocol": "TCP"});
        assert_eq!(obj["spec"]["containers"][0]["ports"][0], port);
    }

    #[test]
    fn probes_get_their_timing_and_handlers() {
        let mut obj = json!({"livenessProbe": {"httpGet": {"port": 8080}}, "readinessProbe": {"grpc": {"port": 1}}});
        container(&mut obj);
        let timing = |extra: Value| {
            let mut probe =
                json!({"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3});
            probe.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            probe
        };
        assert_eq!(obj["livenessProbe"], timing(json!({"httpGet": {"port": 8080, "path": "/", "scheme": "HTTP"}})));
        assert_eq!(obj["readinessProbe"], timing(json!({"grpc": {"port": 1, "service": ""}})));
    }

    #[test]
    fn pull_policy_depends_on_the_tag() {
        let cases = [
            ("nginx", true),
            ("nginx:latest", true),
            ("host:5000/nginx", true),
            ("host:5000/nginx:1.2", false),
            ("nginx@sha256:aa", false),
            ("nginx:latest@sha256:aa", true),
            ("", false),
            ("Upper", false),
        ];
        for (image, always) in cases {
            assert_eq!(pulls_always(image), always, "{image}");
        }
    }

    #[test]
    fn singular_and_plural_addresses_agree() {
        let cases = [
            (json!({"podIP": "1.1.1.1"}), json!({"podIP": "1.1.1.1", "podIPs": [{"ip": "1.1.1.1"}]})),
            (json!({"podIPs": [{"ip": "2.2.2.2"}]}), json!({"podIP": "2.2.2.2", "podIPs": [{"ip": "2.2.2.2"}]})),
            (
                json!({"podIP": "1.1.1.1", "podIPs": [{"ip": "3.3.3.3"}]}),
                json!({"podIP": "1.1.1.1", "podIPs": [{"ip": "1.1.1.1"}]}),
            ),
            (json!({}), json!({})),
        ];
        for (status, expected) in cases {
            let mut obj = json!({"status": status});
            pod_status(&mut obj);
            assert_eq!(obj["status"], expected);
        }
    }

    #[test]
    fn quantities_round_up_to_milli() {
        let cases = [
            ("100u", Some("1m")),
            ("1000000u", Some("1")),
            ("1n", Some("1m")),
            ("0", Some("0")),
            ("5m", Some("5m")),
            ("0.5", Some("500m")),
            ("10Gi", Some("10Gi")),
            ("much", None),
        ];
        for (given, expected) in cases {
            assert_eq!(round_up_to_milli(given).as_deref(), expected, "{given}");
        }
    }
}
