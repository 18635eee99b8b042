//! Rules for security contexts of pods and containers.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::local_path;
use super::{Errors, Path, one_of, one_of_given};
use crate::registry::object::ObjectExt;

const MAX_ID: i64 = i32::MAX as i64;

fn id(obj: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = obj[field].as_i64() {
        id_value(number, path.field(field), errors);
    }
}

fn id_value(number: i64, path: Path<'_>, errors: &mut Errors) {
    if !(0..=MAX_ID).contains(&number) {
        errors.push(FieldError::invalid(path, number, format!("must be between 0 and {MAX_ID}, inclusive")));
    }
}

pub fn container(context: &Value, host_users: bool, path: Path<'_>, errors: &mut Errors) {
    if !context.is_object() {
        return;
    }
    id(context, "runAsUser", path, errors);
    id(context, "runAsGroup", path, errors);
    one_of_given(context, "procMount", &["Default", "Unmasked"], path, errors);
    if host_users && context["procMount"] == "Unmasked" {
        let detail = "`hostUsers` must be false to use `Unmasked`";
        errors.push(FieldError::invalid(path.field("procMount"), "Unmasked", detail));
    }
    profile(&context["seccompProfile"], path.field("seccompProfile"), errors);
    profile(&context["appArmorProfile"], path.field("appArmorProfile"), errors);
    if context["allowPrivilegeEscalation"] == false {
        if context["privileged"] == true {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            errors.push(FieldError::invalid(path, context.clone(), detail));
        }
        if context.list_at(&["capabilities", "add"]).iter().any(|c| c == "CAP_SYS_ADMIN") {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.push(FieldError::invalid(path, context.clone(), detail));
        }
    }
}

/// Profiles for seccomp and AppArmor: `Localhost` names a file, the others do not.
fn profile(profile: &Value, path: Path<'_>, errors: &mut Errors) {
    if !profile.is_object() {
        return;
    }
    let file = &profile["localhostProfile"];
    match profile.str_at(&["type"]) {
        "Localhost" if file.is_null() => {
            let detail = "must be set when seccomp type is Localhost";
            errors.push(FieldError::required(path.field("localhostProfile"), detail));
        }
        "Localhost" => local_path(file.as_str().unwrap_or_default(), path.field("localhostProfile"), errors),
        "RuntimeDefault" | "Unconfined" => {
            if !file.is_null() {
                let detail = "can only be set when seccomp type is Localhost";
                errors.push(FieldError::invalid(path.field("localhostProfile"), file.clone(), detail));
            }
        }
        "" => errors.push(FieldError::required(path.field("type"), "type is required when seccompProfile is set")),
        other => {
            let allowed = ["Localhost", "RuntimeDefault", "Unconfined"];
            errors.push(FieldError::not_supported(path.field("type"), other, &allowed));
        }
    }
}

pub fn pod(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let (context, spec_path, path) = (&spec["securityContext"], path, path.field("securityContext"));
    if spec["hostPID"] == true && spec["shareProcessNamespace"] == true {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        errors.push(FieldError::invalid(spec_path.field("shareProcessNamespace"), true, detail));
    }
    for field in ["fsGroup", "runAsUser", "runAsGroup"] {
        id(context, field, path, errors);
    }
    for (index, group) in context.list_at(&["supplementalGroups"]).iter().enumerate() {
        let path = path.field("supplementalGroups");
        id_value(group.as_i64().unwrap_or(0), path.index(index), errors);
    }
    one_of_given(context, "fsGroupChangePolicy", &["Always", "OnRootMismatch"], path, errors);
    one_of_given(context, "supplementalGroupsPolicy", &["Merge", "Strict"], path, errors);
    one_of(context, "seLinuxChangePolicy", &["MountOption", "Recursive"], path, errors);
    profile(&context["seccompProfile"], path.field("seccompProfile"), errors);
    profile(&context["appArmorProfile"], path.field("appArmorProfile"), errors);
    sysctls(context, spec, path.field("sysctls"), errors);
}

fn sysctls(context: &Value, spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut seen = Vec::new();
    for (index, sysctl) in context.list_at(&["sysctls"]).iter().enumerate() {
        let path = path.index(index);
        let name = sysctl.str_at(&["name"]);
        let segment = |part: &str| {
            let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
            edge(part.chars().next())
                && edge(part.chars().last())
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_'))
        };
        if name.is_empty() {
            errors.push(FieldError::required(path.field("name"), ""));
        } else if name.len() > 253 || !name.split(['.', '/']).all(segment) {
            let detail = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
            errors.push(FieldError::invalid(path.field("name"), name, detail));
        } else if seen.contains(&name) {
            errors.push(FieldError::duplicate(path.field("name"), name));
        }
        seen.push(name);
        let dotted = name.replace('/', ".");
        let (net, ipc) = (
            dotted.starts_with("net."),
            dotted.starts_with("kernel.shm")
                || dotted.starts_with("kernel.msg")
                || dotted == "kernel.sem"
                || dotted.starts_with("fs.mqueue."),
        );
        if net && spec["hostNetwork"] == true {
            errors.push(FieldError::invalid(
                path.field("name"),
                name,
                "may not be specified when 'hostNetwork' is true",
            ));
        }
        if ipc && spec["hostIPC"] == true {
            errors.push(FieldError::invalid(path.field("name"), name, "may not be specified when 'hostIPC' is true"));
        }
    }
}

/// Containers that want more than the cluster allows.
pub fn privileged(spec: &Value, errors: &mut Errors) {
    for list in crate::registry::defaults::pod::CONTAINER_LISTS {
        let path = Path::SPEC.field(list);
        for (index, container) in spec.list_at(&[list]).iter().enumerate() {
            if container["securityContext"]["privileged"] == true {
                let path = path.index(index);
                let path = path.field("securityContext");
                errors.push(FieldError::forbidden(path.field("privileged"), "disallowed by cluster policy"));
            }
        }
    }
}
