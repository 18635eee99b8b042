//! Rules for security contexts of pods and containers, and for the annotations that were there before them.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::mounts::local_path;
use super::{Errors, Path, each, one_of_given, windows};
use crate::registry::defaults::pod::CONTAINER_LISTS;
use crate::registry::object::ObjectExt;

const APP_ARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";
const SECCOMP_OF_POD: &str = "seccomp.security.alpha.kubernetes.io/pod";
const SECCOMP_OF_CONTAINER: &str = "container.seccomp.security.alpha.kubernetes.io/";
const PROFILE_TYPES: [&str; 3] = ["Localhost", "RuntimeDefault", "Unconfined"];

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
    seccomp(&context["seccompProfile"], path.field("seccompProfile"), errors);
    windows::options(&context["windowsOptions"], path.field("windowsOptions"), errors);
    app_armor(&context["appArmorProfile"], path.field("appArmorProfile"), errors);
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

/// A profile for seccomp: `Localhost` names a file, the others do not.
fn seccomp(profile: &Value, path: Path<'_>, errors: &mut Errors) {
    if !profile.is_object() {
        return;
    }
    let (kind, file) = (profile.str_at(&["type"]), profile["localhostProfile"].as_str());
    let file_path = path.field("localhostProfile");
    match kind {
        "" => errors.push(FieldError::required(path.field("type"), "type is required when seccompProfile is set")),
        kind if !PROFILE_TYPES.contains(&kind) => {
            errors.push(FieldError::not_supported(path.field("type"), kind, &PROFILE_TYPES));
        }
        _ => {}
    }
    match (kind, file) {
        ("Localhost", None) => {
            errors.push(FieldError::required(file_path, "must be set when seccomp type is Localhost"));
        }
        ("Localhost", Some(file)) => local_path(file, file_path, errors),
        (_, Some(file)) => {
            // Upstream shows the whole profile, as its own type has it.
            let shown = format!("{{\"Type\":{},\"LocalhostProfile\":{}}}", Value::from(kind), Value::from(file));
            let detail = "can only be set when seccomp type is Localhost";
            errors.push(FieldError::invalid_shown(file_path, &shown, detail));
        }
        (_, None) => {}
    }
}

/// A profile for AppArmor.
fn app_armor(profile: &Value, path: Path<'_>, errors: &mut Errors) {
    const LONGEST: usize = 4095;
    const NEEDED: &str = "must be set when AppArmor type is Localhost";
    if !profile.is_object() {
        return;
    }
    let file = profile["localhostProfile"].as_str();
    let file_path = path.field("localhostProfile");
    match (profile.str_at(&["type"]), file) {
        ("Localhost", None | Some("")) => errors.push(FieldError::required(file_path, NEEDED)),
        ("Localhost", Some(name)) => {
            if name.trim() != name {
                errors.push(FieldError::invalid(file_path, name, "must not be padded with whitespace"));
            }
            if name.len() > LONGEST {
                errors.push(FieldError::too_long(file_path, LONGEST));
            }
        }
        ("RuntimeDefault" | "Unconfined", Some(name)) => {
            let detail = "can only be set when AppArmor type is Localhost";
            errors.push(FieldError::invalid(file_path, name, detail));
        }
        ("RuntimeDefault" | "Unconfined", None) => {}
        ("", _) => {
            errors.push(FieldError::required(path.field("type"), "type is required when appArmorProfile is set"))
        }
        (other, _) => errors.push(FieldError::not_supported(path.field("type"), other, &PROFILE_TYPES)),
    }
}

/// The annotations that said the same before there were fields.
pub fn annotations(obj: &Value, path: Path<'_>, errors: &mut Errors) {
    for (key, value) in obj.annotations().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        if key == SECCOMP_OF_POD || key.starts_with(SECCOMP_OF_CONTAINER) {
            seccomp_annotation(value, path.field(key), errors);
        }
        let Some(name) = key.strip_prefix(APP_ARMOR) else { continue };
        let named = |list: &&str| obj.list_at(&["spec", list]).iter().any(|container| container["name"] == name);
        if !CONTAINER_LISTS.iter().any(named) {
            errors.push(FieldError::invalid(path.key(key), name, "container not found"));
        }
        if !matches!(value, "" | "runtime/default" | "unconfined") && !value.starts_with("localhost/") {
            let detail = format!("invalid AppArmor profile name: {value:?}");
            errors.push(FieldError::invalid(path.key(key), value, detail));
        }
    }
}

fn seccomp_annotation(value: &str, path: Path<'_>, errors: &mut Errors) {
    match value.strip_prefix("localhost/") {
        Some(file) => local_path(file, path, errors),
        None if matches!(value, "runtime/default" | "docker/default" | "unconfined") => {}
        None => errors.push(FieldError::invalid(path, value, "must be a valid seccomp profile")),
    }
}

/// An annotation and a field that are both there say the same.
pub fn app_armor_annotations_match(obj: &Value, errors: &mut Errors) {
    let spec = &obj["spec"];
    if spec["os"]["name"] == "windows" {
        return;
    }
    for list in CONTAINER_LISTS {
        each(spec, list, Path::SPEC, errors, |container, path, errors| {
            let own = &container["securityContext"]["appArmorProfile"];
            let profile = if own.is_object() { own } else { &spec["securityContext"]["appArmorProfile"] };
            let key = format!("{APP_ARMOR}{}", container.str_at(&["name"]));
            let Some(annotation) = obj.annotation(&key) else { return };
            let file = annotation.strip_prefix("localhost/");
            let mut differs = |field: &str, what: &str| {
                let path = path.field("securityContext");
                let path = path.field("appArmorProfile");
                let detail = format!("apparmor {what} in annotation and field must match");
                errors.push(FieldError::forbidden(path.field(field), detail));
            };
            match profile.str_at(&["type"]) {
                "Unconfined" if annotation != "unconfined" => differs("type", "type"),
                "RuntimeDefault" if annotation != "runtime/default" => differs("type", "type"),
                "Localhost" if file.is_none() => differs("type", "type"),
                "Localhost" if file != profile["localhostProfile"].as_str() => differs("localhostProfile", "profile"),
                _ => {}
            }
        });
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
    one_of_given(context, "seLinuxChangePolicy", &["MountOption", "Recursive"], path, errors);
    seccomp(&context["seccompProfile"], path.field("seccompProfile"), errors);
    windows::options(&context["windowsOptions"], path.field("windowsOptions"), errors);
    app_armor(&context["appArmorProfile"], path.field("appArmorProfile"), errors);
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
    for list in CONTAINER_LISTS {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn profiles_name_files_where_they_are_files() {
        let told = |rule: fn(&Value, Path<'_>, &mut Errors), profile: Value| {
            let mut errors = Errors::new();
            rule(&profile, Path::Root("p"), &mut errors);
            texts(&errors)
        };
        assert!(told(seccomp, json!({"type": "Localhost", "localhostProfile": "a.json"})).is_empty());
        let expected = [
            r#"p.localhostProfile: Invalid value: {"Type":"Unconfined","LocalhostProfile":"a"}: can only be set when seccomp type is Localhost"#,
        ];
        assert_eq!(told(seccomp, json!({"type": "Unconfined", "localhostProfile": "a"})), expected);
        let expected = ["p.localhostProfile: Required value: must be set when AppArmor type is Localhost"];
        assert_eq!(told(app_armor, json!({"type": "Localhost", "localhostProfile": ""})), expected);
    }

    #[test]
    fn annotations_say_what_fields_say() {
        let pod = |annotation: &str, kind: &str| {
            let context = json!({"appArmorProfile": {"type": kind}});
            json!({"metadata": {"annotations": {format!("{APP_ARMOR}c"): annotation}},
                "spec": {"containers": [{"name": "c", "securityContext": context}]}})
        };
        for (obj, expected) in [(pod("unconfined", "Unconfined"), 0), (pod("runtime/default", "Unconfined"), 1)] {
            let mut errors = Errors::new();
            app_armor_annotations_match(&obj, &mut errors);
            assert_eq!(errors.len(), expected, "{obj}");
        }
    }
}
