//! Reads the committed table of facts. Its lines, in this order:
//!
//! ```text
//! group <name or -> <versions> <preferred>
//! res <version> <plural> <singular> <group/version/Kind> ns|cluster <verbs> <short names> <categories> <storage hash>
//! sub <name> <group/version/Kind> <verbs>
//! def <name without io.k8s.> [kinds=g/v/K,…] [atomic] [required=<names, where not in alphabetical order>] [unions=<json>]
//! <json name> <protobuf path or -> <type> [attribute…]
//! ```
//!
//! A type is a scalar's name, `@definition`, `[]type` or `{}type`. Attributes: `r` required, `p` Go pointer, `o`
//! omitempty, `z` omitzero, `atomic|set|map=keys|granular`, `ps=` patch strategies, `pk=` merge key, `go=` Go's name of
//! the type, `e=` the values of an enumeration (`~` for a space), and last `d=` the default as JSON.
//!
//! The table is part of the program, so what does not parse is a bug that the tests find.

use super::builtin::{ApiGroup, ApiResource, ApiSubresource, Builtin, Definition};
use super::{
    Field, List, ListKind, Map, Object, Opaque, PatchStrategy, PropsOr, Scalar, Schema, SchemaRef, Shape, name, scalar,
};
use crate::meta::Name;

pub(super) const TABLE: &str = include_str!("facts.txt");

/// Splits the table; definitions keep their lines unparsed.
pub(super) fn index() -> (Vec<ApiGroup>, Vec<ApiResource>, Vec<Definition>) {
    let definitions_start = TABLE.find("\ndef ").map_or(TABLE.len(), |i| i + 1);
    let (head, tail) = TABLE.split_at(definitions_start);
    let mut groups: Vec<ApiGroup> = Vec::new();
    let mut resources: Vec<ApiResource> = Vec::new();
    for line in head.lines() {
        let mut words = line.split(' ');
        match words.next() {
            Some("group") => groups.push(group(words).expect("a group line")),
            Some("res") => {
                let group = groups.last().expect("resources follow their group").name;
                resources.push(resource(group, words).expect("a resource line"));
            }
            Some("sub") => {
                let parent = resources.last_mut().expect("subresources follow their resource");
                parent.subresources.push(subresource(words).expect("a subresource line"));
            }
            _ => {}
        }
    }
    (groups, resources, definitions(tail))
}

fn group(mut words: std::str::Split<'static, char>) -> Option<ApiGroup> {
    Some(ApiGroup { name: text(words.next()?), versions: list(words.next()?), preferred: words.next()? })
}

fn resource(group: &'static str, mut words: std::str::Split<'static, char>) -> Option<ApiResource> {
    let (version, resource, singular) = (words.next()?, words.next()?, text(words.next()?));
    let (_, _, kind) = triple(words.next()?)?;
    Some(ApiResource {
        group,
        version,
        resource,
        singular,
        kind,
        namespaced: words.next()? == "ns",
        verbs: list(words.next()?),
        short_names: list(words.next()?),
        categories: list(words.next()?),
        storage_version_hash: text(words.next()?),
        subresources: Vec::new(),
    })
}

fn subresource(mut words: std::str::Split<'static, char>) -> Option<ApiSubresource> {
    let name = words.next()?;
    let (group, version, kind) = triple(words.next()?)?;
    Some(ApiSubresource { name, group, version, kind, verbs: list(words.next()?) })
}

fn text(word: &'static str) -> &'static str {
    if word == "-" { "" } else { word }
}

fn list(word: &'static str) -> Vec<&'static str> {
    text(word).split(',').filter(|item| !item.is_empty()).collect()
}

/// `group/version/Kind`
pub(super) fn triple(text: &'static str) -> Option<(&'static str, &'static str, &'static str)> {
    let mut parts = text.split('/');
    Some((parts.next()?, parts.next()?, parts.next()?))
}

fn definitions(table: &'static str) -> Vec<Definition> {
    let mut definitions = Vec::new();
    for block in table.strip_prefix("def ").into_iter().flat_map(|t| t.split("\ndef ")) {
        let (head, lines) = block.split_once('\n').unwrap_or((block, ""));
        let (name, attributes) = head.split_once(' ').unwrap_or((head, ""));
        definitions.push(Definition::new(name, attributes, lines));
    }
    definitions
}

pub(super) fn parse(builtin: &Builtin, definition: &Definition) -> Schema {
    object(builtin, definition, definition.attributes.split(' ').any(|a| a == "atomic"))
}

fn object(builtin: &Builtin, definition: &Definition, atomic: bool) -> Schema {
    let mut fields: Vec<Field> =
        definition.lines.lines().map(|line| field(builtin, line).expect("a field line")).collect();
    let short = definition.name.rmatch_indices('.').nth(1).map_or(definition.name, |(i, _)| &definition.name[i + 1..]);
    // Types without a package are of the definition's own.
    let package = short.split('.').next().unwrap_or_default();
    for go in fields.iter_mut().filter_map(|field| field.go_type.as_mut()).filter(|go| !go.contains('.')) {
        *go = Name::Owned(format!("{package}.{go}"));
    }
    Schema::plain(Shape::Object(Object::new(name(short), fields, atomic)))
}

/// What the attributes say about the type itself.
#[derive(Default)]
struct TypeAttributes {
    list: Option<ListKind>,
    atomic: bool,
    granular: bool,
    wrapped: bool,
}

fn field(builtin: &Builtin, line: &'static str) -> Option<Field> {
    // The default comes last and may contain spaces.
    let (line, default) = match line.split_once(" d=") {
        Some((line, default)) => (line, Some(default)),
        None => (line, None),
    };
    let mut words = line.split(' ');
    let (json, numbers, kind) = (words.next()?, words.next()?, words.next()?);
    let mut field = Field::new(name(json), SchemaRef::Static(&super::ANY));
    field.omit_empty = false;
    field.default = default.and_then(|d| serde_json::from_str(d).ok()).map(Box::new);
    for (slot, number) in field.numbers.iter_mut().zip(numbers.split('.')) {
        *slot = number.parse().unwrap_or(0);
    }
    let mut about = TypeAttributes::default();
    for word in words {
        attribute(word, &mut field, &mut about)?;
    }
    field.schema = kind_of(builtin, kind, &about)?;
    Some(field)
}

fn attribute(word: &'static str, field: &mut Field, about: &mut TypeAttributes) -> Option<()> {
    match word.split_once('=').unwrap_or((word, "")) {
        ("r", _) => field.required = true,
        ("p", _) => field.pointer = true,
        ("o", _) => field.omit_empty = true,
        ("z", _) => field.omit_zero = true,
        ("atomic", _) => (about.list, about.atomic) = (Some(ListKind::Atomic), true),
        ("granular", _) => about.granular = true,
        ("set", _) => about.list = Some(ListKind::Set),
        ("map", keys) => about.list = Some(ListKind::Map(keys.split(',').map(name).collect())),
        ("ps", strategies) => {
            field.patch = PatchStrategy {
                merge: strategies.contains("merge"),
                retain_keys: strategies.contains("retainKeys"),
                replace: strategies.contains("replace"),
            };
        }
        // Only published: definitions look it up when they are.
        ("e", _) => {}
        ("pk", key) => field.merge_key = Some(name(key)),
        ("go", go) => {
            about.wrapped = go == "Verbs";
            field.go_type = Some(go_name(go));
        }
        _ => return None,
    }
    Some(())
}

/// Go's name of a type: with the name of its package, which importers may have given another (`corev1`).
fn go_name(go: &'static str) -> Name {
    let Some((package, kind)) = go.split_once('.') else { return name(go) };
    let versioned = package.rfind('v').filter(|at| package[at + 1..].starts_with(|c: char| c.is_ascii_digit()));
    match versioned {
        Some(at) if at > 0 => Name::Owned(format!("{}.{kind}", &package[at..])),
        _ => name(go),
    }
}

fn kind_of(builtin: &Builtin, kind: &'static str, about: &TypeAttributes) -> Option<SchemaRef> {
    if let Some(definition) = kind.strip_prefix('@') {
        let index = builtin.index_of(definition)?;
        if about.granular {
            return Some(object(builtin, &builtin.definitions()[usize::from(index)], false).into());
        }
        return Some(SchemaRef::Definition(index));
    }
    if let Some(item) = kind.strip_prefix("[]") {
        let item = kind_of(builtin, item, &TypeAttributes::default())?;
        let declared = about.list.is_some();
        let kind = about.list.clone().unwrap_or(ListKind::Atomic);
        return Some(Schema::plain(Shape::List(List { item, kind, declared, wrapped: about.wrapped })).into());
    }
    if let Some(value) = kind.strip_prefix("{}") {
        // Protobuf's maps cannot hold lists; upstream wraps them into a message.
        let wrapped = TypeAttributes { wrapped: true, ..TypeAttributes::default() };
        let value = kind_of(builtin, value, &wrapped)?;
        return Some(Schema::plain(Shape::Map(Map { value, atomic: about.atomic })).into());
    }
    macro_rules! opaque {
        ($shape:expr) => {{
            static S: Schema = Schema::plain($shape);
            &S
        }};
    }
    Some(SchemaRef::Static(match kind {
        "string" => scalar(Scalar::String),
        "int32" => scalar(Scalar::Int32),
        "int64" => scalar(Scalar::Int64),
        "bool" => scalar(Scalar::Bool),
        "double" => scalar(Scalar::Double),
        "bytes" => scalar(Scalar::Bytes),
        "time" => scalar(Scalar::Time),
        "microtime" => scalar(Scalar::MicroTime),
        "duration" => scalar(Scalar::Duration),
        "quantity" => scalar(Scalar::Quantity),
        "intstr" => scalar(Scalar::IntOrString),
        "any" => &super::ANY,
        "raw" => opaque!(Shape::Opaque(Opaque::Raw)),
        "fields" => opaque!(Shape::Opaque(Opaque::Fields)),
        "json" => opaque!(Shape::Opaque(Opaque::Json)),
        "propsorarray" => opaque!(Shape::PropsOr(PropsOr::Array)),
        "propsorbool" => opaque!(Shape::PropsOr(PropsOr::Bool)),
        "propsorstrings" => opaque!(Shape::PropsOr(PropsOr::Strings)),
        _ => return None,
    }))
}
