//! The built-in groups, resources and definitions, indexed at first use; definitions are parsed one by one on demand.

use std::collections::HashMap;
use std::sync::{LazyLock, OnceLock};

use super::{Schema, facts};
use crate::meta::{GroupVersion, GroupVersionKind};

/// Everything that is known about the kinds and resources of upstream's release.
#[derive(Debug)]
pub struct Builtin {
    groups: Vec<ApiGroup>,
    resources: Vec<ApiResource>,
    definitions: Vec<Definition>,
    by_name: HashMap<&'static str, u16>,
    by_kind: HashMap<(&'static str, &'static str, &'static str), u16>,
}

/// A group, in the order upstream's discovery lists them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiGroup {
    pub name: &'static str,
    /// Preferred first.
    pub versions: Vec<&'static str>,
    pub preferred: &'static str,
}

/// A resource in one version of its group, as discovery shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceFacts<'a> {
    pub group: &'a str,
    pub version: &'a str,
    /// The plural name in paths.
    pub resource: &'a str,
    pub singular: &'a str,
    pub kind: &'a str,
    pub namespaced: bool,
    /// Sorted.
    pub verbs: Vec<&'a str>,
    pub short_names: Vec<&'a str>,
    pub categories: Vec<&'a str>,
    /// Empty for resources that are not stored.
    pub storage_version_hash: &'a str,
    pub subresources: Vec<SubresourceFacts<'a>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubresourceFacts<'a> {
    pub name: &'a str,
    /// What it speaks, which may be of another group (`policy/v1 Eviction`).
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
    pub verbs: Vec<&'a str>,
}

/// A resource that is built in.
pub type ApiResource = ResourceFacts<'static>;
/// A subresource that is built in.
pub type ApiSubresource = SubresourceFacts<'static>;

#[derive(Debug)]
pub struct Definition {
    /// Without `io.k8s.`
    pub name: &'static str,
    /// The attributes of the `def` line.
    pub attributes: &'static str,
    /// One line per field.
    pub lines: &'static str,
    schema: OnceLock<Schema>,
}

impl Definition {
    pub fn new(name: &'static str, attributes: &'static str, lines: &'static str) -> Self {
        Self { name, attributes, lines, schema: OnceLock::new() }
    }

    /// `group/version/Kind` triples.
    pub fn kinds(&self) -> impl Iterator<Item = (&'static str, &'static str, &'static str)> + use<> {
        let list = self.attributes.split(' ').find_map(|a| a.strip_prefix("kinds=")).unwrap_or("");
        list.split(',').filter_map(facts::triple)
    }
}

/// The facts about built-in kinds; the first call indexes them, which takes well under a millisecond.
pub fn builtin() -> &'static Builtin {
    static BUILTIN: LazyLock<Builtin> = LazyLock::new(|| {
        let (groups, resources, definitions) = facts::index();
        let by_name = definitions.iter().enumerate().map(|(i, d)| (d.name, i as u16)).collect();
        let kinds = definitions.iter().enumerate().flat_map(|(i, d)| d.kinds().map(move |kind| (kind, i as u16)));
        let by_kind = kinds.collect();
        Builtin { groups, resources, definitions, by_name, by_kind }
    });
    &BUILTIN
}

impl Builtin {
    pub fn groups(&self) -> &[ApiGroup] {
        &self.groups
    }

    /// Every served resource of every version.
    pub fn resources(&self) -> &[ApiResource] {
        &self.resources
    }

    pub fn resource(&self, group: &str, version: &str, resource: &str) -> Option<&ApiResource> {
        self.resources.iter().find(|r| r.group == group && r.version == version && r.resource == resource)
    }

    /// The schema of a kind; also of lists, options, `Status` and the kinds that only subresources speak.
    pub fn kind(&self, gvk: &GroupVersionKind) -> Option<&'static Schema> {
        self.kind_of(&gvk.group, &gvk.version, &gvk.kind)
    }

    pub fn kind_of(&self, group: &str, version: &str, kind: &str) -> Option<&'static Schema> {
        let index = self.by_kind.get(&(group, version, kind))?;
        Some(builtin().definition(*index))
    }

    /// By an object's own `apiVersion` and `kind`.
    pub fn kind_of_object(&self, api_version: &str, kind: &str) -> Option<&'static Schema> {
        let GroupVersion { group, version } = GroupVersion::parse(api_version)?;
        self.kind_of(&group, &version, kind)
    }

    /// By the definition's published name, e.g. `io.k8s.api.core.v1.Container`.
    pub fn named(&self, definition: &str) -> Option<&'static Schema> {
        let index = self.by_name.get(definition.strip_prefix("io.k8s.")?)?;
        Some(builtin().definition(*index))
    }

    pub(super) fn definitions(&self) -> &[Definition] {
        &self.definitions
    }

    pub(super) fn index_of(&self, name: &str) -> Option<u16> {
        self.by_name.get(name).copied()
    }

    /// The definition of a kind.
    pub(super) fn kind_index(&self, group: &str, version: &str, kind: &str) -> Option<u16> {
        self.by_kind.get(&(group, version, kind)).copied()
    }

    pub(super) fn definition(&'static self, index: u16) -> &'static Schema {
        let definition = &self.definitions[usize::from(index)];
        definition.schema.get_or_init(|| facts::parse(self, definition))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{ListKind, Scalar, Shape};

    #[test]
    fn covers_every_resource() {
        let builtin = builtin();
        let distinct: std::collections::BTreeSet<_> =
            builtin.resources().iter().map(|r| (r.group, r.resource)).collect();
        assert_eq!((distinct.len(), builtin.resources().len()), (79, 100));
        for resource in builtin.resources() {
            let schema = builtin.kind_of(resource.group, resource.version, resource.kind);
            let object = schema.and_then(Schema::as_object);
            let object = object.unwrap_or_else(|| panic!("no schema of {}", resource.kind));
            assert!(object.field("metadata").is_some(), "{}", resource.kind);
        }
        for gvk in [
            "/v1/Status",
            "/v1/DeleteOptions",
            "autoscaling/v1/Scale",
            "policy/v1/Eviction",
            "/v1/Binding",
            "authentication.k8s.io/v1/TokenRequest",
            "apps/v1/DeleteOptions",
            "/v1/PodList",
            "apps/v1/WatchEvent",
        ] {
            let (group, version, kind) = facts::triple(gvk).expect("triple");
            assert!(builtin.kind_of(group, version, kind).is_some(), "{gvk}");
        }
    }

    #[test]
    fn every_definition_parses() {
        for index in 0..builtin().definitions.len() {
            let schema = builtin().definition(index as u16);
            let object = schema.as_object().expect("an object");
            for field in object.fields() {
                let _: &Schema = &field.schema;
            }
        }
    }

    #[test]
    fn fields_carry_what_merges_need() {
        let container = builtin().named("io.k8s.api.core.v1.Container").and_then(Schema::as_object).expect("Container");
        let ports = container.field("ports").expect("ports");
        assert!(ports.patch.merge && ports.merge_key.as_deref() == Some("containerPort"));
        let Shape::List(list) = &ports.schema.shape else { panic!("a list") };
        assert_eq!(list.kind, ListKind::Map(vec!["containerPort".into(), "protocol".into()].into()));
        let protocol = list.item.as_object().and_then(|o| o.field("protocol")).expect("protocol");
        assert_eq!(protocol.default.as_deref(), Some(&"TCP".into()));
        assert!(matches!(protocol.schema.shape, Shape::Scalar(Scalar::String)));
        let volume = builtin().named("io.k8s.api.core.v1.Volume").and_then(Schema::as_object).expect("Volume");
        assert_eq!(volume.field("emptyDir").map(|f| f.numbers), Some([2, 2, 0]));
    }
}
