//! Rules for volumes that are put together from several sources.

use apimachinery::meta::validation::is_qualified_name;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::certificates::{bundle_reference, signer_name};
use super::volume::{downward_file, file_path, key_to_path};
use super::{Errors, Path, each, label_selector, required};
use crate::registry::object::ObjectExt;

const KEY_TYPES: [&str; 6] = ["RSA3072", "RSA4096", "ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519"];
const SHORTEST_CERTIFICATE: i64 = 60 * 60;
const LONGEST_CERTIFICATE: i64 = 91 * 24 * 60 * 60;
/// What the cluster's own signers give at most.
const LONGEST_KUBERNETES_CERTIFICATE: i64 = 24 * 60 * 60;
const ANNOTATIONS_MAX: usize = 256 * 1024;

/// The files of the volume so far. Those that are made twice are complained about as a fault of the volume.
struct Files<'p> {
    volume: Path<'p>,
    made: Vec<String>,
}

impl Files<'_> {
    /// `shown`: what the complaint shows, for sources with a name that name.
    fn make(&mut self, path: &str, shown: &str, errors: &mut Errors) {
        if self.made.iter().any(|made| made == path) {
            errors.push(FieldError::invalid(self.volume, shown, "conflicting duplicate paths"));
        } else {
            self.made.push(path.to_owned());
        }
    }
}

pub fn sources(volume: &Value, path: Path<'_>, errors: &mut Errors) {
    const KINDS: [&str; 6] =
        ["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"];
    let mut files = Files { volume: path, made: Vec::new() };
    each(volume, "sources", path, errors, |source, source_path, errors| {
        let given = KINDS.into_iter().filter(|kind| source[*kind].is_object());
        let mut found = 0;
        for kind in given {
            found += 1;
            let (value, kind_path) = (&source[kind], source_path.field(kind));
            match kind {
                "secret" | "configMap" => keys(value, &mut files, kind_path, errors),
                "downwardAPI" => downward(value, &mut files, kind_path, errors),
                "serviceAccountToken" => token(value, path, kind_path, errors),
                "clusterTrustBundle" => bundle(value, &mut files, kind_path, errors),
                _ => certificate(value, &mut files, kind_path, errors),
            }
        }
        if found > 1 {
            errors.push(FieldError::forbidden(source_path, "may not specify more than 1 volume type per source"));
        }
    });
}

fn keys(source: &Value, files: &mut Files<'_>, path: Path<'_>, errors: &mut Errors) {
    required(source, "name", path, errors);
    each(source, "items", path, errors, |item, path, errors| {
        key_to_path(item, path, errors);
        let file = item.str_at(&["path"]);
        if !file.is_empty() {
            files.make(file, source.str_at(&["name"]), errors);
        }
    });
}

fn downward(source: &Value, files: &mut Files<'_>, path: Path<'_>, errors: &mut Errors) {
    for item in source.list_at(&["items"]) {
        downward_file(item, path, errors);
        let file = item.str_at(&["path"]);
        if !file.is_empty() {
            files.make(file, file, errors);
        }
    }
}

/// The path of the file is complained about as if it were the volume's: so does upstream.
fn token(source: &Value, volume: Path<'_>, path: Path<'_>, errors: &mut Errors) {
    let seconds_path = path.field("expirationSeconds");
    match source["expirationSeconds"].as_i64() {
        None => errors.push(FieldError::required(seconds_path, "")),
        Some(seconds) if seconds < 600 => {
            let detail = "may not specify a duration less than 10 minutes";
            errors.push(FieldError::invalid(seconds_path, seconds, detail));
        }
        Some(seconds) if seconds > 1 << 32 => {
            let detail = "may not specify a duration larger than 2^32 seconds";
            errors.push(FieldError::invalid(seconds_path, seconds, detail));
        }
        Some(_) => {}
    }
    if let Some(text) = required(source, "path", volume, errors) {
        file_path(text, volume.field("path"), errors);
    }
}

/// Certificates of one bundle by its name, or of all bundles of a signer.
fn bundle(source: &Value, files: &mut Files<'_>, path: Path<'_>, errors: &mut Errors) {
    let selector = &source["labelSelector"];
    match (source["name"].as_str(), source["signerName"].as_str()) {
        (None, None) => errors.push(FieldError::required(path, "either name or signerName must be specified")),
        (Some(_), Some(_)) => {
            errors.push(FieldError::invalid(path, source.clone(), "only one of name and signerName may be used"));
        }
        (Some(name), None) => {
            if name.is_empty() {
                errors.push(FieldError::required(path.field("name"), "must be a valid object name"));
            }
            for problem in bundle_reference(name) {
                let detail = format!("not a valid clustertrustbundlename: {problem}");
                errors.push(FieldError::invalid(path.field("name"), name, detail));
            }
            if !selector.is_null() {
                let detail = "labelSelector must be unset if name is specified";
                errors.push(FieldError::invalid(path.field("labelSelector"), selector.clone(), detail));
            }
        }
        (None, Some(signer)) => {
            if signer.is_empty() {
                errors.push(FieldError::required(path.field("signerName"), "must be a valid signer name"));
            }
            signer_name(signer, path.field("signerName"), errors);
            label_selector(selector, path.field("labelSelector"), errors);
        }
    }
    required(source, "path", path, errors);
    let file = source.str_at(&["path"]);
    file_path(file, path.field("path"), errors);
    files.make(file, file, errors);
}

/// A key and a certificate of the pod's own.
fn certificate(source: &Value, files: &mut Files<'_>, path: Path<'_>, errors: &mut Errors) {
    let signer = source.str_at(&["signerName"]);
    signer_name(signer, path.field("signerName"), errors);
    user_annotations(&source["userAnnotations"], path.field("userAnnotations"), errors);
    let kind = source.str_at(&["keyType"]);
    if !KEY_TYPES.contains(&kind) {
        errors.push(FieldError::not_supported(path.field("keyType"), kind, &KEY_TYPES));
    }
    lifetime(source, signer, path, errors);
    let paths = ["credentialBundlePath", "keyPath", "certificateChainPath"];
    let mut given = 0;
    for (field, file) in paths.map(|field| (field, source.str_at(&[field]))) {
        if !file.is_empty() {
            given += 1;
            file_path(file, path.field(field), errors);
            files.make(file, file, errors);
        }
    }
    if given == 0 {
        let detail = "specify at least one of credentialBundlePath, keyPath, and certificateChainPath";
        errors.push(FieldError::required(path, detail));
    }
}

fn lifetime(source: &Value, signer: &str, path: Path<'_>, errors: &mut Errors) {
    let Some(seconds) = source["maxExpirationSeconds"].as_i64() else { return };
    let domain = signer.split('/').next().unwrap_or_default();
    let is_kubernetes = domain == "kubernetes.io" || domain.ends_with(".kubernetes.io");
    let longest = if is_kubernetes { LONGEST_KUBERNETES_CERTIFICATE } else { LONGEST_CERTIFICATE };
    let bound = match seconds {
        ..SHORTEST_CERTIFICATE => format!(">= {SHORTEST_CERTIFICATE}"),
        seconds if seconds > longest => format!("<= {longest}"),
        _ => return,
    };
    let detail = format!("if provided, maxExpirationSeconds must be {bound}");
    errors.push(FieldError::invalid(path.field("maxExpirationSeconds"), seconds, detail));
}

/// Annotations of the request for the certificate; their keys have domains.
fn user_annotations(map: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut size = 0;
    for (key, value) in map.as_object().into_iter().flatten() {
        size += key.len() + value.as_str().map_or(0, str::len);
        let lower = key.to_lowercase();
        super::complain(is_qualified_name(&lower), &lower, path, errors);
    }
    if size > ANNOTATIONS_MAX {
        errors.push(FieldError::too_long(path, ANNOTATIONS_MAX));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    fn told(list: Value) -> Vec<String> {
        let mut errors = Errors::new();
        sources(&json!({"sources": list}), Path::Root("projected"), &mut errors);
        texts(&errors)
    }

    #[test]
    fn certificates_of_pods_live_for_an_hour_up_to_three_months() {
        for (signer, seconds, bound) in [
            ("example.com/s", 3599, Some(">= 3600")),
            ("example.com/s", 3600, None),
            ("example.com/s", 7_862_400, None),
            ("example.com/s", 7_862_401, Some("<= 7862400")),
            ("kubernetes.io/s", 86_401, Some("<= 86400")),
        ] {
            let source = json!([{"podCertificate": {"signerName": signer, "keyType": "ED25519",
                "maxExpirationSeconds": seconds, "keyPath": "k"}}]);
            let expected = bound.map(|bound| {
                format!(
                    "projected.sources[0].podCertificate.maxExpirationSeconds: Invalid value: {seconds}: if provided, \
                     maxExpirationSeconds must be {bound}"
                )
            });
            assert_eq!(told(source), Vec::from_iter(expected), "{signer} {seconds}");
        }
    }

    #[test]
    fn no_file_is_made_twice() {
        let map = |name: &str| json!({"configMap": {"name": name, "items": [{"key": "k", "path": "p"}]}});
        assert_eq!(told(json!([map("a")])), Vec::<String>::new());
        assert_eq!(
            told(json!([map("a"), map("b")])),
            [r#"projected: Invalid value: "b": conflicting duplicate paths"#]
        );
    }

    #[test]
    fn bundles_are_found_by_name_or_signer() {
        let bundle = |source: Value| told(json!([{"clusterTrustBundle": source}]));
        assert!(bundle(json!({"signerName": "example.com/s", "path": "c"})).is_empty());
        assert!(bundle(json!({"name": "example.com:s:b", "path": "c"})).is_empty());
        let expected =
            ["projected.sources[0].clusterTrustBundle: Required value: either name or signerName must be specified"];
        assert_eq!(bundle(json!({"path": "c"})), expected);
    }
}
