//! `EncryptionConfiguration` (`apiserver.config.k8s.io/v1`): which resources are sealed, with which providers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use apimachinery::codec::yaml;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::Providers;
use super::ciphers::{Cipher, Provider};
use crate::registry::layout;
use crate::registry::object::ObjectExt;

#[derive(Debug, thiserror::Error)]
pub enum EncryptionConfigError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the encryption configuration is no YAML: {0}")]
    Yaml(String),
    #[error("encryption configuration: {field}: {what}")]
    Field { field: String, what: String },
}

/// Keys of the store's own are no objects.
const OWN: &str = "ketch";

fn wrong(field: impl Into<String>, what: impl Into<String>) -> EncryptionConfigError {
    EncryptionConfigError::Field { field: field.into(), what: what.into() }
}

/// Resources, and how they are sealed; the first that names a resource counts.
pub struct EncryptionConfig {
    entries: Vec<(Vec<Names>, Providers)>,
    /// Where the store's keys begin.
    prefix: String,
    /// Of the resources that are built in, by the path of their keys; the index of their entry.
    builtin: HashMap<String, Option<usize>>,
}

/// Which resources are meant.
enum Names {
    /// `secrets`, `deployments.apps`
    One { group: String, resource: String },
    /// `*.apps`, and `*.` for the group without a name.
    Group(String),
    /// `*.*`
    All,
}

impl Names {
    fn read(text: &str) -> Self {
        match text.split_once('.') {
            Some(("*", "*")) => Self::All,
            Some(("*", group)) => Self::Group(group.to_owned()),
            Some((resource, group)) => Self::One { group: group.to_owned(), resource: resource.to_owned() },
            None => Self::One { group: String::new(), resource: text.to_owned() },
        }
    }

    fn name(&self, group: &str, resource: &str) -> bool {
        match self {
            Self::One { group: wanted, resource: name } => wanted == group && name == resource,
            Self::Group(wanted) => wanted == group,
            Self::All => true,
        }
    }
}

impl EncryptionConfig {
    /// `prefix`: where the store's keys begin.
    pub fn read(path: &Path, prefix: &str) -> Result<Self, EncryptionConfigError> {
        let bytes =
            std::fs::read(path).map_err(|source| EncryptionConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&bytes, prefix)
    }

    pub fn parse(bytes: &[u8], prefix: &str) -> Result<Self, EncryptionConfigError> {
        let config = yaml::parse(bytes).map_err(|error| EncryptionConfigError::Yaml(error.to_string()))?.value;
        if config["kind"] != "EncryptionConfiguration" || config.api_version() != "apiserver.config.k8s.io/v1" {
            return Err(wrong("kind", "must be EncryptionConfiguration of apiserver.config.k8s.io/v1"));
        }
        let resources = config.list_at(&["resources"]);
        if resources.is_empty() {
            return Err(wrong("resources", "provider config file must contain at least one resource"));
        }
        let mut entries = Vec::new();
        for (index, entry) in resources.iter().enumerate() {
            let at = format!("resources[{index}]");
            let names: Vec<Names> =
                entry.list_at(&["resources"]).iter().filter_map(Value::as_str).map(Names::read).collect();
            if names.is_empty() {
                return Err(wrong(format!("{at}.resources"), "at least one resource is required"));
            }
            entries.push((names, providers(entry, &at)?));
        }
        let mut config = Self { entries, prefix: format!("{prefix}/"), builtin: HashMap::new() };
        for api in apimachinery::schema::builtin().resources() {
            let path = layout::resource_prefix(api.group, api.resource);
            let entry = config.entry_of(api.group, api.resource);
            // Events have two groups, and one place.
            let known = config.builtin.entry(path).or_insert(entry);
            *known = known.or(entry);
        }
        Ok(config)
    }

    fn entry_of(&self, group: &str, resource: &str) -> Option<usize> {
        self.entries.iter().position(|(names, _)| names.iter().any(|names| names.name(group, resource)))
    }

    /// How the value of a key is sealed. `None`: it is not.
    pub(super) fn of_key(&self, key: &str) -> Option<&Providers> {
        let path = key.strip_prefix(&self.prefix)?;
        let (first, rest) = path.split_once('/').filter(|(first, _)| *first != OWN)?;
        let second = rest.split('/').next().unwrap_or_default();
        let two = &path[..first.len() + 1 + second.len()];
        let entry = match self.builtin.get(two).or_else(|| self.builtin.get(first)) {
            Some(entry) => *entry,
            None => self.entry_of(first, second),
        };
        Some(&self.entries[entry?].1)
    }
}

fn providers(entry: &Value, at: &str) -> Result<Providers, EncryptionConfigError> {
    let mut all = Vec::new();
    for (index, provider) in entry.list_at(&["providers"]).iter().enumerate() {
        let at = format!("{at}.providers[{index}]");
        let members = provider.as_object().map(|members| members.iter().collect::<Vec<_>>()).unwrap_or_default();
        let [(kind, settings)] = members.as_slice() else {
            return Err(wrong(at, "must have exactly one of identity, aescbc, aesgcm and secretbox"));
        };
        match kind.as_str() {
            "identity" => all.push(Provider::identity()),
            "aescbc" | "aesgcm" | "secretbox" => all.extend(keys(kind, settings, &format!("{at}.{kind}"))?),
            "kms" => return Err(wrong(format!("{at}.kms"), "key management services are not supported")),
            other => return Err(wrong(at, format!("unknown provider {other:?}"))),
        }
    }
    match all.is_empty() {
        true => Err(wrong(format!("{at}.providers"), "at least one provider is required")),
        false => Ok(Providers(all)),
    }
}

fn keys(kind: &str, settings: &Value, at: &str) -> Result<Vec<Provider>, EncryptionConfigError> {
    let given = settings.list_at(&["keys"]);
    if given.is_empty() {
        return Err(wrong(format!("{at}.keys"), "at least one key is required"));
    }
    let mut keys = Vec::new();
    for (index, key) in given.iter().enumerate() {
        let at = format!("{at}.keys[{index}]");
        let name = key.str_at(&["name"]);
        if name.is_empty() || name.contains(':') {
            return Err(wrong(format!("{at}.name"), "must not be empty or contain a colon"));
        }
        let secret = STANDARD.decode(key.str_at(&["secret"]));
        let secret = secret.map_err(|_| wrong(format!("{at}.secret"), "must be base64"))?;
        let length = secret.len();
        let (cipher, lengths) = match kind {
            "aescbc" => (Cipher::aes_cbc(secret), "16, 24 or 32"),
            "aesgcm" => (Cipher::aes_gcm(&secret), "16, 24 or 32"),
            _ => (Cipher::secret_box(&secret), "32"),
        };
        let what = || format!("has {length} bytes, expected {lengths}");
        keys.push(Provider::new(kind, name, cipher.ok_or_else(|| wrong(format!("{at}.secret"), what()))?));
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(resources: &str) -> Result<EncryptionConfig, String> {
        let text =
            format!("kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n{resources}");
        EncryptionConfig::parse(text.as_bytes(), "/registry").map_err(|error| error.to_string())
    }

    #[test]
    fn resources_are_found_by_their_keys() {
        let config = parse("- resources: [secrets, nodes]\n  providers: [{identity: {}}]\n- resources: ['*.apps', 'things.example.com']\n  providers: [{identity: {}}]\n").unwrap();
        let found = |key: &str| {
            let providers = config.of_key(key)?;
            config.entries.iter().position(|(_, entry)| std::ptr::eq(entry, providers))
        };
        let cases = [
            ("/registry/secrets/a/b", Some(0)),
            ("/registry/minions/n", Some(0)),
            ("/registry/deployments/a/b", Some(1)),
            ("/registry/example.com/things/a/b", Some(1)),
            ("/registry/example.com/others/a/b", None),
            ("/registry/services/specs/a/b", None),
            ("/registry/configmaps/a/b", None),
            ("/other/secrets/a/b", None),
        ];
        for (key, expected) in cases {
            assert_eq!(found(key), expected, "{key}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("- resources: [secrets]\n  providers: []\n", "resources[0].providers: at least one provider is required"),
            (
                "- resources: [secrets]\n  providers: [{aescbc: {keys: [{name: a, secret: YQ==}]}}]\n",
                "resources[0].providers[0].aescbc.keys[0].secret: has 1 bytes, expected 16, 24 or 32",
            ),
            (
                "- resources: [secrets]\n  providers: [{kms: {}}]\n",
                "resources[0].providers[0].kms: key management services are not supported",
            ),
        ];
        for (resources, expected) in cases {
            assert_eq!(parse(resources).err(), Some(format!("encryption configuration: {expected}")));
        }
    }
}
