//! What clients are told who send an object of another kind than the URL is about.

use apimachinery::meta::{GroupVersion, GroupVersionKind};
use apimachinery::schema::builtin;
use apimachinery::status::Status;

/// `kind` and `api_version` are the body's; `wanted` is what the URL takes.
pub fn other_kind(kind: &str, api_version: &str, wanted: &GroupVersionKind) -> Status {
    let given = GroupVersion::parse(api_version).unwrap_or_default();
    let version = &given.version;
    let why = match builtin().kind_of(&given.group, version, kind) {
        // A kind that is known is read, and then cannot become the other one.
        Some(_) => {
            let package = go_package(&wanted.group);
            format!("converting ({version}.{kind}) to ({package}.{}): unknown conversion", wanted.kind)
        }
        None => format!("no kind {kind:?} is registered for version {:?}", given.to_string()),
    };
    Status::bad_request(format!("{kind} in version {version:?} cannot be handled as a {}: {why}", wanted.kind))
}

/// The package of a group's internal types.
fn go_package(group: &str) -> &str {
    match group.split('.').next() {
        None | Some("") => "core",
        Some(first) => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_that_are_known_cannot_be_converted() {
        let wanted = GroupVersionKind::new("", "v1", "ConfigMap");
        let cases = [
            (
                "Secret",
                "v1",
                r#"Secret in version "v1" cannot be handled as a ConfigMap: converting (v1.Secret) to (core.ConfigMap): unknown conversion"#,
            ),
            (
                "Zzz",
                "zzz/v1",
                r#"Zzz in version "v1" cannot be handled as a ConfigMap: no kind "Zzz" is registered for version "zzz/v1""#,
            ),
        ];
        for (kind, api_version, expected) in cases {
            assert_eq!(other_kind(kind, api_version, &wanted).message, expected);
        }
    }
}
