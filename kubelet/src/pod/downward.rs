//! The downward API: fields of the pod and figures of its containers as text, for variables and files.

use std::collections::BTreeMap;

use apimachinery::meta::Quantity;
use k8s_openapi::api::core::v1::{Container as Spec, Pod, ResourceFieldSelector};

#[derive(Debug, thiserror::Error)]
pub enum DownwardError {
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    #[error("unsupported container resource: {0}")]
    Resource(String),
    #[error("container {0} not found")]
    Container(String),
}

/// The pod and what the node knows about it.
pub struct Downward<'a> {
    pub pod: &'a Pod,
    pub pod_ips: &'a [String],
    pub host_ips: &'a [String],
    /// Allocatable amounts of the node, which stand in for limits that are not set; memory in bytes.
    pub node_cpu_milli: i64,
    pub node_memory: i64,
}

impl Downward<'_> {
    pub fn field(&self, path: &str) -> Result<String, DownwardError> {
        let (metadata, spec) = (&self.pod.metadata, self.pod.spec.as_ref());
        let text = |text: Option<&String>| text.cloned().unwrap_or_default();
        let keyed = |map: &Option<BTreeMap<String, String>>, key: &str| text(map.as_ref().and_then(|map| map.get(key)));
        if let Some((kind, key)) = path.strip_suffix("']").and_then(|path| path.split_once("['")) {
            return match kind {
                "metadata.labels" => Ok(keyed(&metadata.labels, key)),
                "metadata.annotations" => Ok(keyed(&metadata.annotations, key)),
                _ => Err(DownwardError::Field(path.to_owned())),
            };
        }
        Ok(match path {
            "metadata.name" => text(metadata.name.as_ref()),
            "metadata.namespace" => text(metadata.namespace.as_ref()),
            "metadata.uid" => text(metadata.uid.as_ref()),
            "metadata.labels" => lines(&metadata.labels),
            "metadata.annotations" => lines(&metadata.annotations),
            "spec.nodeName" => text(spec.and_then(|spec| spec.node_name.as_ref())),
            "spec.serviceAccountName" => text(spec.and_then(|spec| spec.service_account_name.as_ref())),
            "status.podIP" => text(self.pod_ips.first()),
            "status.podIPs" => self.pod_ips.join(","),
            "status.hostIP" => text(self.host_ips.first()),
            "status.hostIPs" => self.host_ips.join(","),
            _ => return Err(DownwardError::Field(path.to_owned())),
        })
    }

    /// The amount divided by the selector's divisor, rounded up.
    pub fn resource(&self, selector: &ResourceFieldSelector, own: Option<&Spec>) -> Result<String, DownwardError> {
        let name = selector.container_name.as_deref().filter(|name| !name.is_empty());
        let containers =
            self.pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
        let spec = match name {
            Some(name) => containers
                .into_iter()
                .find(|spec| spec.name == name)
                .ok_or_else(|| DownwardError::Container(name.to_owned()))?,
            None => own.ok_or_else(|| DownwardError::Container(String::new()))?,
        };
        let (side, resource) = selector.resource.split_once('.').unwrap_or_default();
        let empty = Default::default();
        let requirements = spec.resources.as_ref().unwrap_or(&empty);
        let amounts = match side {
            "limits" => &requirements.limits,
            "requests" => &requirements.requests,
            _ => return Err(DownwardError::Resource(selector.resource.clone())),
        };
        let set = amounts.as_ref().and_then(|map| map.get(resource)?.0.parse::<Quantity>().ok());
        let milli = match (set.map(|quantity| i128::from(quantity.milli_value())), side, resource) {
            (Some(milli), ..) => milli,
            (None, "limits", "cpu") => i128::from(self.node_cpu_milli),
            (None, "limits", "memory") => i128::from(self.node_memory) * 1000,
            (None, ..) => 0,
        };
        let divisor = selector.divisor.as_ref().and_then(|divisor| divisor.0.parse::<Quantity>().ok());
        let divisor =
            divisor.map(|divisor| i128::from(divisor.milli_value())).filter(|milli| *milli > 0).unwrap_or(1000);
        Ok(((milli + divisor - 1) / divisor).to_string())
    }
}

/// `key="value"` lines in key order, quoted as Go's `%q`.
fn lines(map: &Option<BTreeMap<String, String>>) -> String {
    let quoted = |text: &str| {
        let mut out = String::from("\"");
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
                c => out.push(c),
            }
        }
        out.push('"');
        out
    };
    map.iter().flatten().map(|(key, value)| format!("{key}={}\n", quoted(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_resources() {
        let text = "metadata: {name: p, labels: {a: 'x\"y', b: z}}\nspec: {nodeName: node1, containers: \
            [{name: c, resources: {limits: {cpu: 1500m, memory: 64Mi}}}, {name: d}]}";
        let pod: Pod = serde_json::from_value(serde_saphyr::from_str(text).unwrap()).unwrap();
        let ips = ["10.0.0.1".to_owned(), "fd00::1".to_owned()];
        let downward = Downward { pod: &pod, pod_ips: &ips, host_ips: &[], node_cpu_milli: 2000, node_memory: 1 << 30 };
        for (path, want) in [
            ("metadata.name", "p"),
            ("metadata.labels", "a=\"x\\\"y\"\nb=\"z\"\n"),
            ("metadata.labels['b']", "z"),
            ("metadata.annotations['none']", ""),
            ("status.podIPs", "10.0.0.1,fd00::1"),
        ] {
            assert_eq!(downward.field(path).unwrap(), want, "{path}");
        }
        assert!(downward.field("spec.containers").is_err());
        for (container, resource, divisor, want) in [
            ("c", "limits.cpu", "", "2"),
            ("c", "limits.cpu", "1m", "1500"),
            ("c", "limits.memory", "1Mi", "64"),
            ("d", "limits.cpu", "1", "2"),
            ("d", "limits.memory", "", "1073741824"),
            ("d", "requests.cpu", "", "0"),
        ] {
            let selector: ResourceFieldSelector = serde_json::from_value(serde_json::json!({
                "containerName": container, "resource": resource, "divisor": divisor
            }))
            .unwrap();
            assert_eq!(downward.resource(&selector, None).unwrap(), want, "{container} {resource} {divisor}");
        }
    }
}
