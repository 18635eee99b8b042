//! Pods that say nothing about failing nodes stay on them for a while: `not-ready` and `unreachable` are tolerated for
//! `--default-*-toleration-seconds`.

use std::sync::Arc;

use apimachinery::status::Result;
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{AdmissionRequest, Plugin};
use crate::config::Config;
use crate::registry::object::ObjectExt;
use crate::server::Server;

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

pub struct DefaultTolerationSeconds {
    defaults: [(&'static str, i64); 2],
}

impl DefaultTolerationSeconds {
    pub fn new(config: &Config) -> Self {
        let Config { default_not_ready_toleration_seconds, default_unreachable_toleration_seconds, .. } = config;
        Self {
            defaults: [
                (NOT_READY, *default_not_ready_toleration_seconds),
                (UNREACHABLE, *default_unreachable_toleration_seconds),
            ],
        }
    }

    fn add(&self, pod: &mut Value) {
        let mut tolerations = pod.list_at(&["spec", "tolerations"]).to_vec();
        let given = tolerations.len();
        for (key, seconds) in self.defaults {
            let covered = tolerations[..given].iter().any(|toleration| {
                let (of_key, effect) = (toleration.str_at(&["key"]), toleration.str_at(&["effect"]));
                (of_key == key || of_key.is_empty()) && matches!(effect, "" | "NoExecute")
            });
            if !covered {
                tolerations.push(
                    json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}),
                );
            }
        }
        if tolerations.len() > given {
            pod.set(&["spec", "tolerations"], tolerations);
        }
    }
}

#[async_trait]
impl Plugin for DefaultTolerationSeconds {
    fn name(&self) -> &'static str {
        "DefaultTolerationSeconds"
    }

    async fn admit(&self, _server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if request.is("", "pods") {
            self.add(request.object);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_added() {
        let plugin = DefaultTolerationSeconds::new(&Config::for_etcd("http://127.0.0.1:1"));
        for (given, count) in [
            (json!([]), 2),
            (json!([{"key": NOT_READY, "operator": "Exists", "effect": "NoExecute"}]), 2),
            (json!([{"operator": "Exists"}]), 1),
            (json!([{"key": "x", "effect": "NoSchedule"}]), 3),
        ] {
            let mut pod = json!({"spec": {"tolerations": given}});
            plugin.add(&mut pod);
            plugin.add(&mut pod);
            assert_eq!(pod.list_at(&["spec", "tolerations"]).len(), count, "{pod}");
        }
    }
}
