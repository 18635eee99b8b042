//! What the levels of the pod security standards forbid, in upstream's words: `REASON (DETAIL)` per violated check,
//! the baseline's checks first, each level's in the order of their names.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Level;
use crate::registry::object::ObjectExt;

type Violation = Option<(&'static str, String)>;

type Check<'a> = for<'b> fn(&'b Pod<'a>) -> Violation;

/// Every violated check of the level, as the standards were in this minor version.
pub fn violations<'a>(level: Level, minor: u32, pod: &'a Value) -> Vec<String> {
    let baseline: [Check<'a>; 9] = [
        Pod::app_armor,
        Pod::host_namespaces,
        Pod::host_ports,
        Pod::host_probes,
        Pod::privileged,
        Pod::proc_mount,
        Pod::se_linux,
        Pod::sysctls,
        Pod::windows_host_process,
    ];
    // In the place of each of these, `restricted` has a stricter check.
    let baseline_only: [Check<'a>; 3] = [Pod::default_capabilities, Pod::host_path_volumes, Pod::explicit_seccomp];
    // Since which version there is each, and what was there before.
    let restricted: [(u32, Check<'a>, Option<Check<'a>>); 6] = [
        (8, Pod::privilege_escalation, None),
        (22, Pod::dropped_capabilities, Some(Pod::default_capabilities)),
        (0, Pod::volume_types, None),
        (0, Pod::non_root, None),
        (23, Pod::root_user, None),
        (19, Pod::required_seccomp, Some(Pod::explicit_seccomp)),
    ];
    let restricted: Vec<Check<'a>> = restricted
        .into_iter()
        .filter_map(|(since, check, before)| if minor >= since { Some(check) } else { before })
        .collect();
    let checks: &[&[Check<'a>]] = match level {
        Level::Privileged => &[],
        Level::Baseline => &[&baseline, &baseline_only],
        Level::Restricted => &[&baseline, &restricted],
    };
    let pod = Pod::new(pod);
    let found = checks.iter().copied().flatten().filter_map(|check| check(&pod));
    let text = |(reason, detail): (&str, String)| {
        if detail.is_empty() { reason.to_owned() } else { format!("{reason} ({detail})") }
    };
    found.map(text).collect()
}

struct Pod<'a> {
    object: &'a Value,
    containers: Vec<&'a Value>,
}

fn quoted<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    names.into_iter().map(|name| format!("{:?}", name.as_ref())).collect::<Vec<_>>().join(", ")
}

fn plural<'a>(count: usize, one: &'a str, many: &'a str) -> &'a str {
    if count == 1 { one } else { many }
}

/// `container "a"` or `containers "a", "b"`.
fn containers(names: &[&str]) -> String {
    format!("{} {}", plural(names.len(), "container", "containers"), quoted(names))
}

/// `pod`, the containers, or both.
fn setters(pod: bool, names: &[&str]) -> Option<String> {
    match (pod, names) {
        (false, []) => None,
        (true, []) => Some("pod".to_owned()),
        (false, names) => Some(containers(names)),
        (true, names) => Some(format!("pod and {}", containers(names))),
    }
}

impl<'a> Pod<'a> {
    fn new(object: &'a Value) -> Self {
        let lists = ["initContainers", "containers", "ephemeralContainers"].into_iter();
        Self { object, containers: lists.flat_map(|list| object.list_at(&["spec", list])).collect() }
    }

    fn is_windows(&self) -> bool {
        self.object.str_at(&["spec", "os", "name"]) == "windows"
    }

    /// Pods in a user namespace of their own may be root there.
    fn has_own_users(&self) -> bool {
        self.object.bool_at(&["spec", "hostUsers"]) == Some(false)
    }

    /// Names of the containers that satisfy the predicate.
    fn having(&self, bad: impl Fn(&Value) -> bool) -> Vec<&'a str> {
        self.containers.iter().filter(|container| bad(container)).map(|container| container.str_at(&["name"])).collect()
    }

    /// A value of the pod's security context that is bad, the containers with bad ones, and all bad values.
    fn bad_values(&self, path: &[&str], bad: impl Fn(&str) -> bool) -> (bool, Vec<&'a str>, BTreeSet<String>) {
        let full: Vec<&str> = ["securityContext"].iter().chain(path).copied().collect();
        let value = |object: &'a Value| object.at(&full).and_then(Value::as_str).filter(|value| bad(value));
        let spec = &self.object["spec"];
        let mut values: BTreeSet<String> = value(spec).map(str::to_owned).into_iter().collect();
        let mut names = Vec::new();
        for container in &self.containers {
            if let Some(bad) = value(container) {
                names.push(container.str_at(&["name"]));
                values.insert(bad.to_owned());
            }
        }
        (value(spec).is_some(), names, values)
    }

    fn app_armor(&self) -> Violation {
        let is_bad = |kind: &str| !matches!(kind, "RuntimeDefault" | "Localhost");
        let (pod, names, values) = self.bad_values(&["appArmorProfile", "type"], is_bad);
        let annotations: Vec<String> = self
            .object
            .annotations()
            .into_iter()
            .flatten()
            .filter(|(key, _)| key.starts_with("container.apparmor.security.beta.kubernetes.io/"))
            .filter_map(|(key, value)| Some((key, value.as_str()?)))
            .filter(|(_, value)| !value.is_empty() && *value != "runtime/default" && !value.starts_with("localhost/"))
            .map(|(key, value)| format!("{key}={value:?}"))
            .collect();
        let mut who: Vec<String> = setters(pod, &names).into_iter().collect();
        if !annotations.is_empty() {
            who.push(plural(annotations.len(), "annotation", "annotations").to_owned());
        }
        let all: Vec<String> = values.into_iter().chain(annotations).collect();
        let reason = if all.len() == 1 { "forbidden AppArmor profile" } else { "forbidden AppArmor profiles" };
        let detail = format!("{} must not set AppArmor profile type to {}", who.join(" and "), quoted(&all));
        (!who.is_empty()).then_some((reason, detail))
    }

    fn host_namespaces(&self) -> Violation {
        let fields = ["hostNetwork", "hostPID", "hostIPC"].into_iter();
        let used: Vec<String> =
            fields.filter(|field| self.object["spec"][field] == true).map(|field| format!("{field}=true")).collect();
        (!used.is_empty()).then(|| ("host namespaces", used.join(", ")))
    }

    fn host_ports(&self) -> Violation {
        let ports = |container: &Value| -> Vec<i64> {
            container
                .list_at(&["ports"])
                .iter()
                .filter_map(|port| port.i64_at(&["hostPort"]))
                .filter(|port| *port != 0)
                .collect()
        };
        let names = self.having(|container| !ports(container).is_empty());
        let used: BTreeSet<String> =
            self.containers.iter().flat_map(|c| ports(c)).map(|port| port.to_string()).collect();
        (!names.is_empty()).then(|| {
            let list = used.iter().cloned().collect::<Vec<_>>().join(", ");
            let verb = plural(names.len(), "uses", "use");
            (
                "hostPort",
                format!("{} {verb} {} {list}", containers(&names), plural(used.len(), "hostPort", "hostPorts")),
            )
        })
    }

    fn host_probes(&self) -> Violation {
        const HANDLERS: [&[&str]; 5] = [
            &["livenessProbe"],
            &["readinessProbe"],
            &["startupProbe"],
            &["lifecycle", "postStart"],
            &["lifecycle", "preStop"],
        ];
        let hosts = |container: &Value| -> Vec<String> {
            let handlers = HANDLERS.iter().filter_map(|path| container.at(path));
            let hosts = handlers
                .flat_map(|handler| ["httpGet", "tcpSocket"].map(|kind| handler.str_at(&[kind, "host"]).to_owned()));
            hosts.filter(|host| !host.is_empty()).collect()
        };
        let names: BTreeSet<&str> = self.having(|container| !hosts(container).is_empty()).into_iter().collect();
        let used: BTreeSet<String> = self.containers.iter().flat_map(|container| hosts(container)).collect();
        (!names.is_empty()).then(|| {
            let names: Vec<&str> = names.into_iter().collect();
            let what = plural(used.len(), "probe or lifecycle host", "probe or lifecycle hosts");
            let verb = plural(names.len(), "uses", "use");
            ("probe or lifecycle host", format!("{} {verb} {what} {}", containers(&names), quoted(&used)))
        })
    }

    fn privileged(&self) -> Violation {
        let names = self.having(|container| container["securityContext"]["privileged"] == true);
        (!names.is_empty())
            .then(|| ("privileged", format!("{} must not set securityContext.privileged=true", containers(&names))))
    }

    fn proc_mount(&self) -> Violation {
        if self.has_own_users() {
            return None;
        }
        let (_, names, values) = self.bad_values(&["procMount"], |kind| kind != "Default");
        (!names.is_empty()).then(|| {
            (
                "procMount",
                format!("{} must not set securityContext.procMount to {}", containers(&names), quoted(&values)),
            )
        })
    }

    fn se_linux(&self) -> Violation {
        const TYPES: [&str; 5] = ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];
        let options = |object: &'a Value| object.at(&["securityContext", "seLinuxOptions"]);
        let is_bad = |options: &Value| {
            !TYPES.contains(&options.str_at(&["type"]))
                || !options.str_at(&["user"]).is_empty()
                || !options.str_at(&["role"]).is_empty()
        };
        let pod = options(&self.object["spec"]);
        let names = self.having(|container| container.at(&["securityContext", "seLinuxOptions"]).is_some_and(is_bad));
        let who = setters(pod.is_some_and(is_bad), &names)?;
        let all: Vec<&Value> = pod.into_iter().chain(self.containers.iter().copied().filter_map(options)).collect();
        let types: BTreeSet<&str> =
            all.iter().map(|o| o.str_at(&["type"])).filter(|kind| !TYPES.contains(kind)).collect();
        let mut wrong = Vec::new();
        if !types.is_empty() {
            wrong.push(format!("{} {}", plural(types.len(), "type", "types"), quoted(&types)));
        }
        for field in ["user", "role"] {
            if all.iter().any(|options| !options.str_at(&[field]).is_empty()) {
                wrong.push(format!("{field} may not be set"));
            }
        }
        Some(("seLinuxOptions", format!("{who} set forbidden securityContext.seLinuxOptions: {}", wrong.join("; "))))
    }

    fn sysctls(&self) -> Violation {
        const ALLOWED: [&str; 14] = [
            "kernel.shm_rmid_forced",
            "net.ipv4.ip_local_port_range",
            "net.ipv4.tcp_syncookies",
            "net.ipv4.ping_group_range",
            "net.ipv4.ip_unprivileged_port_start",
            "net.ipv4.ip_local_reserved_ports",
            "net.ipv4.tcp_keepalive_time",
            "net.ipv4.tcp_fin_timeout",
            "net.ipv4.tcp_keepalive_intvl",
            "net.ipv4.tcp_keepalive_probes",
            "net.ipv4.tcp_rmem",
            "net.ipv4.tcp_wmem",
            "net.ipv4.tcp_slow_start_after_idle",
            "net.ipv4.tcp_notsent_lowat",
        ];
        let names =
            self.object.list_at(&["spec", "securityContext", "sysctls"]).iter().map(|sysctl| sysctl.str_at(&["name"]));
        let forbidden: Vec<&str> = names.filter(|name| !ALLOWED.contains(name)).collect();
        (!forbidden.is_empty()).then(|| ("forbidden sysctls", forbidden.join(", ")))
    }

    fn windows_host_process(&self) -> Violation {
        let is_host = |object: &Value| object["securityContext"]["windowsOptions"]["hostProcess"] == true;
        let who = setters(is_host(&self.object["spec"]), &self.having(is_host))?;
        Some(("hostProcess", format!("{who} must not set securityContext.windowsOptions.hostProcess=true")))
    }

    /// Containers that add a capability beyond the allowed ones, and what they add.
    fn added(&self, allowed: &[&str]) -> (Vec<&'a str>, BTreeSet<&'a str>) {
        let adds = |container: &'a Value| {
            let list = container.list_at(&["securityContext", "capabilities", "add"]).iter().filter_map(Value::as_str);
            list.filter(|name| !allowed.contains(name)).collect::<Vec<_>>()
        };
        let (mut names, mut capabilities) = (Vec::new(), BTreeSet::new());
        for container in &self.containers {
            let bad = adds(container);
            if !bad.is_empty() {
                names.push(container.str_at(&["name"]));
                capabilities.extend(bad);
            }
        }
        (names, capabilities)
    }

    fn default_capabilities(&self) -> Violation {
        const ALLOWED: [&str; 13] = [
            "AUDIT_WRITE",
            "CHOWN",
            "DAC_OVERRIDE",
            "FOWNER",
            "FSETID",
            "KILL",
            "MKNOD",
            "NET_BIND_SERVICE",
            "SETFCAP",
            "SETGID",
            "SETPCAP",
            "SETUID",
            "SYS_CHROOT",
        ];
        let (names, added) = self.added(&ALLOWED);
        (!names.is_empty()).then(|| {
            let detail = format!(
                "{} must not include {} in securityContext.capabilities.add",
                containers(&names),
                quoted(&added)
            );
            ("non-default capabilities", detail)
        })
    }

    fn host_path_volumes(&self) -> Violation {
        let volumes =
            self.object.list_at(&["spec", "volumes"]).iter().filter(|volume| volume.get("hostPath").is_some());
        let names: Vec<&str> = volumes.map(|volume| volume.str_at(&["name"])).collect();
        (!names.is_empty())
            .then(|| ("hostPath volumes", format!("{} {}", plural(names.len(), "volume", "volumes"), quoted(&names))))
    }

    fn explicit_seccomp(&self) -> Violation {
        let is_bad = |kind: &str| !matches!(kind, "RuntimeDefault" | "Localhost");
        let (pod, names, values) = self.bad_values(&["seccompProfile", "type"], is_bad);
        let who = setters(pod, &names)?;
        Some((
            "seccompProfile",
            format!("{who} must not set securityContext.seccompProfile.type to {}", quoted(&values)),
        ))
    }

    fn privilege_escalation(&self) -> Violation {
        let names = self.having(|container| container["securityContext"]["allowPrivilegeEscalation"] != false);
        (!names.is_empty() && !self.is_windows()).then(|| {
            let detail = format!("{} must set securityContext.allowPrivilegeEscalation=false", containers(&names));
            ("allowPrivilegeEscalation != false", detail)
        })
    }

    fn dropped_capabilities(&self) -> Violation {
        if self.is_windows() {
            return None;
        }
        let keeps = self.having(|container| {
            !container.list_at(&["securityContext", "capabilities", "drop"]).iter().any(|name| name == "ALL")
        });
        let (adds, added) = self.added(&["NET_BIND_SERVICE"]);
        let mut details = Vec::new();
        if !keeps.is_empty() {
            details.push(format!("{} must set securityContext.capabilities.drop=[\"ALL\"]", containers(&keeps)));
        }
        if !adds.is_empty() {
            details.push(format!(
                "{} must not include {} in securityContext.capabilities.add",
                containers(&adds),
                quoted(&added)
            ));
        }
        (!details.is_empty()).then(|| ("unrestricted capabilities", details.join("; ")))
    }

    fn volume_types(&self) -> Violation {
        const ALLOWED: [&str; 9] = [
            "configMap",
            "csi",
            "downwardAPI",
            "emptyDir",
            "ephemeral",
            "image",
            "persistentVolumeClaim",
            "projected",
            "secret",
        ];
        let kind = |volume: &'a Value| {
            let mut keys =
                volume.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).filter(|key| *key != "name");
            keys.next().unwrap_or("unknown")
        };
        let volumes = self.object.list_at(&["spec", "volumes"]).iter();
        let bad: Vec<(&str, &str)> = volumes
            .filter(|volume| !ALLOWED.iter().any(|allowed| volume.get(*allowed).is_some()))
            .map(|volume| (volume.str_at(&["name"]), kind(volume)))
            .collect();
        let kinds: BTreeSet<&str> = bad.iter().map(|(_, kind)| *kind).collect();
        (!bad.is_empty()).then(|| {
            let what = plural(kinds.len(), "restricted volume type", "restricted volume types");
            let (noun, verb) = (plural(bad.len(), "volume", "volumes"), plural(bad.len(), "uses", "use"));
            let names = quoted(bad.iter().map(|(name, _)| *name));
            ("restricted volume types", format!("{noun} {names} {verb} {what} {}", quoted(&kinds)))
        })
    }

    fn non_root(&self) -> Violation {
        const REASON: &str = "runAsNonRoot != true";
        if self.has_own_users() {
            return None;
        }
        let setting = |object: &Value| object.bool_at(&["securityContext", "runAsNonRoot"]);
        let of_pod = setting(&self.object["spec"]);
        let explicit = self.having(|container| setting(container) == Some(false));
        if let Some(who) = setters(of_pod == Some(false), &explicit) {
            return Some((REASON, format!("{who} must not set securityContext.runAsNonRoot=false")));
        }
        let implicit = self.having(|container| setting(container).is_none() && of_pod != Some(true));
        (!implicit.is_empty())
            .then(|| (REASON, format!("pod or {} must set securityContext.runAsNonRoot=true", containers(&implicit))))
    }

    fn root_user(&self) -> Violation {
        if self.has_own_users() {
            return None;
        }
        let is_root = |object: &Value| object.i64_at(&["securityContext", "runAsUser"]) == Some(0);
        let who = setters(is_root(&self.object["spec"]), &self.having(is_root))?;
        Some(("runAsUser=0", format!("{who} must not set runAsUser=0")))
    }

    fn required_seccomp(&self) -> Violation {
        if self.is_windows() {
            return None;
        }
        if let Some(violation) = self.explicit_seccomp() {
            return Some(violation);
        }
        let is_set = |object: &Value| {
            object.at(&["securityContext", "seccompProfile"]).is_some_and(|profile| !profile.is_null())
        };
        if is_set(&self.object["spec"]) {
            return None;
        }
        let names = self.having(|container| !is_set(container));
        (!names.is_empty()).then(|| {
            let rule = "must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\"";
            ("seccompProfile", format!("pod or {} {rule}", containers(&names)))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn baseline() {
        for (spec, expected) in [
            (json!({"containers": [{"name": "a"}]}), ""),
            (
                json!({"hostNetwork": true, "hostIPC": true, "hostPID": true}),
                "host namespaces (hostNetwork=true, hostPID=true, hostIPC=true)",
            ),
            (
                json!({"containers": [{"name": "a"}, {"name": "b", "ports": [{"hostPort": 20}]}]}),
                r#"hostPort (container "b" uses hostPort 20)"#,
            ),
            (
                json!({"containers": [{"name": "a", "securityContext": {"privileged": true}}]}),
                r#"privileged (container "a" must not set securityContext.privileged=true)"#,
            ),
            (
                json!({"containers": [
                    {"name": "a", "securityContext": {"capabilities": {"add": ["FOO", "BAR"]}}},
                    {"name": "b", "securityContext": {"capabilities": {"add": ["BAZ", "CHOWN"]}}}]}),
                r#"non-default capabilities (containers "a", "b" must not include "BAR", "BAZ", "FOO" in securityContext.capabilities.add)"#,
            ),
            (json!({"volumes": [{"name": "v", "hostPath": {}}]}), r#"hostPath volumes (volume "v")"#),
            (
                json!({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}),
                r#"forbidden AppArmor profile (pod must not set AppArmor profile type to "Unconfined")"#,
            ),
        ] {
            assert_eq!(violations(Level::Baseline, u32::MAX, &json!({"spec": spec})).join(", "), expected);
        }
    }

    #[test]
    fn restricted() {
        let careless = json!({"spec": {"containers": [{"name": "c"}]}});
        assert_eq!(
            violations(Level::Restricted, u32::MAX, &careless).join(", "),
            concat!(
                r#"allowPrivilegeEscalation != false (container "c" must set securityContext.allowPrivilegeEscalation=false), "#,
                r#"unrestricted capabilities (container "c" must set securityContext.capabilities.drop=["ALL"]), "#,
                r#"runAsNonRoot != true (pod or container "c" must set securityContext.runAsNonRoot=true), "#,
                r#"seccompProfile (pod or container "c" must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")"#,
            )
        );
        let careful = json!({"spec": {
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
        assert!(violations(Level::Restricted, u32::MAX, &careful).is_empty());
        assert!(violations(Level::Privileged, u32::MAX, &careless).is_empty());
    }
}
