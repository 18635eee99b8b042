//! The schema model: what fields a kind has, of which types, how its lists and maps merge, and how it travels as
//! protobuf. Built-in kinds (from a committed table of facts) and custom resources (from their definitions) have the
//! same model, so strict decoding, pruning, patches, server-side apply and publishing work for both.
//!
//! It never holds prose, and it parses a definition only when somebody asks for it: a process that meets ten kinds
//! pays for ten.

mod builtin;
mod custom;
mod facts;
pub(crate) mod go_names;
pub mod openapi;

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use serde_json::Value;

pub use builtin::{ApiGroup, ApiResource, ApiSubresource, Builtin, ResourceFacts, SubresourceFacts, builtin};
pub use custom::SchemaError;

use crate::meta::Name;

/// The type of one value.
#[derive(Clone, Debug)]
pub struct Schema {
    pub shape: Shape,
    /// Custom resources: null is a value of its own here.
    pub nullable: bool,
    /// From a custom resource's definition: decoding prunes but leaves type errors to validation.
    pub custom: bool,
}

#[derive(Clone, Debug)]
pub enum Shape {
    /// Anything goes in and is kept as it is.
    Opaque(Opaque),
    Scalar(Scalar),
    Object(Object),
    Map(Map),
    List(List),
    /// One of the three either-or types inside `JSONSchemaProps`.
    PropsOr(PropsOr),
}

/// Where arbitrary JSON comes from; it only makes a difference as protobuf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opaque {
    /// Schemaless; no protobuf form.
    Any,
    /// `runtime.RawExtension`: usually an object with a kind of its own.
    Raw,
    /// `metav1.FieldsV1`
    Fields,
    /// `apiextensions.JSON`
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    String,
    Int32,
    Int64,
    Bool,
    Double,
    /// Base64 in JSON.
    Bytes,
    /// RFC 3339, whole seconds.
    Time,
    /// RFC 3339, microseconds.
    MicroTime,
    /// Go's notation (`1h2m3s`).
    Duration,
    Quantity,
    IntOrString,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PropsOr {
    Array,
    Bool,
    Strings,
}

/// A struct.
#[derive(Clone, Debug)]
pub struct Object {
    /// As Go names it, e.g. `v1.Container`; empty for custom resources.
    pub name: Name,
    /// Sorted by name.
    fields: Box<[Field]>,
    /// Indices into `fields` of those with a protobuf number, in the order they go on the wire.
    wire: Box<[u16]>,
    /// Applied and owned as a whole.
    pub atomic: bool,
    /// Custom resources: unknown fields are kept.
    pub preserve_unknown: bool,
}

#[derive(Clone, Debug)]
pub struct Field {
    pub name: Name,
    pub schema: SchemaRef,
    /// Protobuf field numbers, outermost message first and padded with 0; inlined structs have more than one.
    pub numbers: [u16; 3],
    pub required: bool,
    /// Go has a pointer here, so that zero and absent differ.
    pub pointer: bool,
    /// Go leaves it out of JSON when it is empty.
    pub omit_empty: bool,
    /// Go leaves it out of JSON when it is a struct without content.
    pub omit_zero: bool,
    pub default: Option<Box<Value>>,
    pub patch: PatchStrategy,
    /// Which field of the items identifies them in a strategic merge patch.
    pub merge_key: Option<Name>,
    /// The Go name of a named scalar, e.g. `v1.Protocol`.
    pub go_type: Option<Name>,
}

/// How a strategic merge patch treats a field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PatchStrategy {
    /// Lists merge instead of being replaced.
    pub merge: bool,
    /// Keys that the patch does not list are dropped (volumes, deployment strategies).
    pub retain_keys: bool,
    /// Maps are replaced instead of merged.
    pub replace: bool,
}

/// A map from strings to values of one type.
#[derive(Clone, Debug)]
pub struct Map {
    pub value: SchemaRef,
    pub atomic: bool,
}

#[derive(Clone, Debug)]
pub struct List {
    pub item: SchemaRef,
    pub kind: ListKind,
    /// Whether upstream publishes the list's kind; undeclared ones are atomic.
    pub declared: bool,
    /// In protobuf the list is a message of its own, whose field 1 is repeated.
    pub wrapped: bool,
}

/// How server-side apply sees a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListKind {
    Atomic,
    /// Scalars, each owned by itself.
    Set,
    /// Objects, identified by these fields.
    Map(Box<[Name]>),
}

/// A schema inside another one. Built-in definitions are shared and may be recursive.
#[derive(Clone, Debug)]
pub enum SchemaRef {
    Definition(u16),
    Static(&'static Schema),
    Owned(Arc<Schema>),
}

impl Deref for SchemaRef {
    type Target = Schema;

    fn deref(&self) -> &Schema {
        match self {
            Self::Definition(index) => builtin().definition(*index),
            Self::Static(schema) => schema,
            Self::Owned(schema) => schema,
        }
    }
}

/// A schema without content: any JSON.
pub static ANY: Schema = Schema::plain(Shape::Opaque(Opaque::Any));

impl Schema {
    const fn plain(shape: Shape) -> Self {
        Self { shape, nullable: false, custom: false }
    }

    pub fn as_object(&self) -> Option<&Object> {
        match &self.shape {
            Shape::Object(object) => Some(object),
            _ => None,
        }
    }

    /// The type of a field, a map's value or a list's item by this path step; `None` where nothing is known.
    pub fn child(&self, name: &str) -> Option<&Schema> {
        match &self.shape {
            Shape::Object(object) => object.field(name).map(|f| &*f.schema),
            Shape::Map(map) => Some(&map.value),
            _ => None,
        }
    }

    pub fn item(&self) -> Option<&Schema> {
        match &self.shape {
            Shape::List(list) => Some(&list.item),
            _ => None,
        }
    }

    /// Fills in the defaults that a custom resource's definition declares, and drops nulls where null is no value and
    /// a default exists. Built-in kinds have their own defaulting and are left alone.
    pub fn apply_defaults(&self, value: &mut Value) {
        if self.custom {
            custom::apply_defaults(self, value);
        }
    }
}

impl Object {
    pub(crate) fn new(name: Name, mut fields: Vec<Field>, atomic: bool) -> Self {
        fields.sort_by(|a, b| a.name.cmp(&b.name));
        let mut wire: Vec<u16> =
            (0..fields.len()).map(|i| i as u16).filter(|i| fields[*i as usize].numbers[0] > 0).collect();
        wire.sort_by_key(|i| fields[*i as usize].numbers);
        Self { name, fields: fields.into(), wire: wire.into(), atomic, preserve_unknown: false }
    }

    pub fn field(&self, name: &str) -> Option<&Field> {
        let index = self.fields.binary_search_by(|f| (*f.name).cmp(name)).ok()?;
        Some(&self.fields[index])
    }

    /// Sorted by name.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The fields that have protobuf numbers, in wire order.
    pub fn wire_fields(&self) -> impl Iterator<Item = &Field> {
        self.wire.iter().map(|i| &self.fields[*i as usize])
    }
}

impl Field {
    pub(crate) fn new(name: Name, schema: SchemaRef) -> Self {
        Self {
            name,
            schema,
            numbers: [0; 3],
            required: false,
            pointer: false,
            omit_empty: true,
            omit_zero: false,
            default: None,
            patch: PatchStrategy::default(),
            merge_key: None,
            go_type: None,
        }
    }
}

impl From<Schema> for SchemaRef {
    fn from(schema: Schema) -> Self {
        Self::Owned(Arc::new(schema))
    }
}

/// The static schema of a scalar.
pub(crate) fn scalar(scalar: Scalar) -> &'static Schema {
    macro_rules! table {
        ($($name:ident),*) => {
            match scalar { $(Scalar::$name => { static S: Schema = Schema::plain(Shape::Scalar(Scalar::$name)); &S })* }
        };
    }
    table!(String, Int32, Int64, Bool, Double, Bytes, Time, MicroTime, Duration, Quantity, IntOrString)
}

pub(crate) fn name(text: &'static str) -> Name {
    Cow::Borrowed(text)
}
