//! Rules for what only Windows has, and for what it has not.

use std::sync::LazyLock;

use apimachinery::meta::validation::is_dns1123_subdomain;
use apimachinery::status::FieldError;
use regex::Regex;
use serde_json::Value;

use super::{Errors, Path, complain, each};
use crate::registry::defaults::pod::CONTAINER_LISTS;

const SPEC_BYTES_MAX: usize = 64 * 1024;
const DOMAIN_MAX: usize = 256;
const USER_MAX: usize = 104;

#[allow(clippy::unwrap_used, reason = "constant patterns, compiled by the test below")]
static NETBIOS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r#"^[^\\/:\*\?"<>|\.][^\\/:\*\?"<>|]{0,14}$"#).unwrap());
#[allow(clippy::unwrap_used, reason = "constant patterns, compiled by the test below")]
static DNS_DOMAIN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^[a-zA-Z0-9](?:[a-zA-Z0-9\-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9\-]*[a-zA-Z0-9])?)*$").unwrap()
});

/// `windowsOptions` of a pod or container.
pub fn options(options: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(name) = options["gmsaCredentialSpecName"].as_str() {
        complain(is_dns1123_subdomain(name), name, path.field("gmsaCredentialSpecName"), errors);
    }
    if let Some(spec) = options["gmsaCredentialSpec"].as_str() {
        let detail = match spec.len() {
            0 => "gmsaCredentialSpec cannot be an empty string",
            len if len > SPEC_BYTES_MAX => "gmsaCredentialSpec size must be under 64 KiB",
            _ => "",
        };
        if !detail.is_empty() {
            errors.push(FieldError::invalid(path.field("gmsaCredentialSpec"), spec, detail));
        }
    }
    if let Some(name) = options["runAsUserName"].as_str() {
        for detail in user_name(name) {
            errors.push(FieldError::invalid(path.field("runAsUserName"), name, format!("runAsUserName{detail}")));
        }
    }
}

/// What is wrong with `domain\user`.
fn user_name(name: &str) -> Vec<String> {
    if name.is_empty() {
        return vec![" cannot be an empty string".into()];
    }
    if name.chars().any(char::is_control) {
        return vec![" cannot contain control characters".into()];
    }
    let (domain, user) = match name.split('\\').collect::<Vec<_>>()[..] {
        [user] => (None, user),
        [domain, user] => (Some(domain), user),
        _ => return vec![" cannot contain more than one backslash".into()],
    };
    let mut problems = Vec::new();
    if let Some(domain) = domain {
        if domain.len() >= DOMAIN_MAX {
            problems.push(format!("'s Domain length must be under {DOMAIN_MAX} characters"));
        }
        if !NETBIOS.is_match(domain) && !DNS_DOMAIN.is_match(domain) {
            problems.push("'s Domain doesn't match the NetBios nor the DNS format".into());
        }
    }
    if user.is_empty() {
        problems.push("'s User cannot be empty".into());
    } else if user.len() > USER_MAX {
        problems.push(format!("'s User length must not be longer than {USER_MAX} characters"));
    }
    if user.chars().all(|letter| letter == '.' || letter == ' ') && !user.is_empty() {
        problems.push("'s User cannot contain only periods or spaces".into());
    }
    if user.contains(['"', '/', '\\', ':', ';', '|', '=', ',', '+', '*', '?', '<', '>', '@', '[', ']']) {
        problems.push(r#"'s User cannot contain the following characters: "/\:;|=,+*?<>@[]"#.into());
    }
    problems
}

/// Containers that run as processes of the node: all of the pod's or none.
pub fn host_process(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let wants = |holder: &Value| holder["securityContext"]["windowsOptions"]["hostProcess"].as_bool();
    let of_pod = wants(spec);
    let (mut all, mut hosted) = (0, 0);
    for list in CONTAINER_LISTS {
        each(spec, list, path, errors, |container, path, errors| {
            let own = wants(container);
            all += 1;
            hosted += usize::from(own.or(of_pod) == Some(true));
            if let (Some(of_pod), Some(own)) = (of_pod, own)
                && of_pod != own
            {
                let detail = format!("pod hostProcess value must be identical if both are specified, was {of_pod}");
                errors.push(FieldError::invalid(
                    format!("{path}.securityContext.windowsOptions.hostProcess"),
                    own,
                    detail,
                ));
            }
        });
    }
    if hosted == 0 {
        return;
    }
    if hosted != all {
        let detail = "If pod contains any hostProcess containers then all containers must be HostProcess containers";
        errors.push(FieldError::invalid(path, "", detail));
    }
    if spec["hostNetwork"] != true {
        let detail = "hostNetwork must be true if pod contains any hostProcess containers";
        errors.push(FieldError::invalid(path.field("hostNetwork"), false, detail));
    }
}

/// Pods for Linux have no options for Windows.
pub fn none(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    forbidden(
        spec,
        &["windowsOptions"],
        &["windowsOptions"],
        "windows options cannot be set for a linux pod",
        path,
        errors,
    );
}

/// Pods for Windows have nothing that only Linux has.
pub fn only(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const DETAIL: &str = "cannot be set for a windows pod";
    const OF_POD: [&str; 11] = [
        "appArmorProfile",
        "seLinuxOptions",
        "seccompProfile",
        "fsGroup",
        "fsGroupChangePolicy",
        "sysctls",
        "runAsUser",
        "runAsGroup",
        "supplementalGroups",
        "supplementalGroupsPolicy",
        "seLinuxChangePolicy",
    ];
    const OF_CONTAINER: [&str; 10] = [
        "appArmorProfile",
        "seLinuxOptions",
        "seccompProfile",
        "capabilities",
        "readOnlyRootFilesystem",
        "privileged",
        "allowPrivilegeEscalation",
        "procMount",
        "runAsUser",
        "runAsGroup",
    ];
    forbidden(spec, &OF_POD, &OF_CONTAINER, DETAIL, path, errors);
    for field in ["hostUsers", "shareProcessNamespace"] {
        if !spec[field].is_null() {
            errors.push(FieldError::forbidden(path.field(field), DETAIL));
        }
    }
    for field in ["hostPID", "hostIPC"] {
        if spec[field] == true {
            errors.push(FieldError::forbidden(path.field(field), DETAIL));
        }
    }
}

/// Fields of the security contexts of the pod and of its containers.
fn forbidden(spec: &Value, of_pod: &[&str], of_container: &[&str], detail: &str, path: Path<'_>, errors: &mut Errors) {
    let given = |context: &Value, field: &str| match &context[field] {
        Value::Null => false,
        // An empty list of these is none.
        Value::Array(items) => field != "sysctls" || !items.is_empty(),
        _ => true,
    };
    let context = path.field("securityContext");
    for field in of_pod.iter().filter(|field| given(&spec["securityContext"], field)) {
        errors.push(FieldError::forbidden(context.field(field), detail));
    }
    for list in CONTAINER_LISTS {
        each(spec, list, path, errors, |container, path, errors| {
            let path = path.field("securityContext");
            for field in of_container.iter().filter(|field| given(&container["securityContext"], field)) {
                errors.push(FieldError::forbidden(path.field(field), detail));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn users_have_names_that_windows_accepts() {
        for good in ["Administrator", r"NT AUTHORITY\SYSTEM", r"example.com\jane", "a b"] {
            assert!(user_name(good).is_empty(), "{good}: {:?}", user_name(good));
        }
        for (bad, problems) in [("", 1), ("a\tb", 1), (r"a\b\c", 1), (r"a\", 1), ("...", 1), ("a@b", 1), (r"..\a", 1)] {
            assert_eq!(user_name(bad).len(), problems, "{bad}: {:?}", user_name(bad));
        }
    }

    #[test]
    fn pods_are_for_one_system() {
        let spec = json!({"securityContext": {"runAsUser": 1, "sysctls": []}, "hostPID": false,
            "containers": [{"securityContext": {"procMount": "Default", "windowsOptions": {}}}]});
        let (mut linux, mut windows) = (Errors::new(), Errors::new());
        none(&spec, Path::SPEC, &mut linux);
        only(&spec, Path::SPEC, &mut windows);
        let expected = [
            "spec.containers[0].securityContext.windowsOptions: Forbidden: windows options cannot be set for a linux pod",
        ];
        assert_eq!(texts(&linux), expected);
        let expected = [
            "spec.securityContext.runAsUser: Forbidden: cannot be set for a windows pod",
            "spec.containers[0].securityContext.procMount: Forbidden: cannot be set for a windows pod",
        ];
        assert_eq!(texts(&windows), expected);
    }
}
