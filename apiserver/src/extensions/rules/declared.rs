//! What a schema declares to expressions: which values they see, of which types, and how large the values can become.
//! Values whose schema says nothing about them are not seen.

use std::collections::BTreeMap;

use cel::common::types::{CelBytes, CelDouble, CelList, CelString};
use cel::common::value::Val;
use serde_json::Value;

use super::escape::escape;
use super::keyed::KeyedList;
use crate::cel::check::Type;
use crate::cel::{convert, from_json, map};
use crate::registry::object::ObjectExt;

/// The largest request, by which everything is bounded that a schema does not bound.
const LARGEST: u64 = 3 * 1024 * 1024;

/// A part of an object as expressions see it.
#[derive(Debug)]
pub struct Declared {
    pub shape: Shape,
    /// The most letters, items or members of a value; of what has none of these, nothing.
    pub most: u64,
    /// The fewest bytes that a value takes in a request.
    pub least_size: u64,
}

#[derive(Debug)]
pub enum Shape {
    /// An integer or a string.
    IntOrText,
    Bool,
    Int,
    Double,
    Text,
    Bytes,
    Duration,
    Date,
    DateTime,
    List {
        item: Box<Declared>,
        keys: Option<Vec<String>>,
    },
    Map(Box<Declared>),
    /// By the names that the properties have in objects.
    Object(BTreeMap<String, Declared>),
}

impl Declared {
    /// `None`: expressions do not see such values. `is_resource`: the root of an object, or of one embedded in it.
    pub fn read(schema: &Value, is_resource: bool) -> Option<Self> {
        let bound = |field: &str| schema[field].as_i64().map(|most| u64::try_from(most).unwrap_or(0));
        if schema["x-kubernetes-int-or-string"] == true {
            let most = bound("maxLength").map_or(LARGEST - 2, |most| most.saturating_mul(4));
            return Some(Self { shape: Shape::IntOrText, most, least_size: 1 });
        }
        let plain = |shape, least_size| Some(Self { shape, most: 0, least_size });
        match schema.str_at(&["type"]) {
            "boolean" => plain(Shape::Bool, 4),
            "integer" => plain(Shape::Int, 1),
            "number" => plain(Shape::Double, 1),
            "string" => Some(Self::text(schema)),
            "array" => Self::list(&schema["items"], schema, bound("maxItems")),
            "object" if schema["additionalProperties"].is_object() => {
                let value = Self::read_inner(&schema["additionalProperties"])?;
                // At least a key, quotes, a colon and a comma.
                let most = bound("maxProperties").unwrap_or((LARGEST - 2) / (value.least_size + 6));
                Some(Self { shape: Shape::Map(Box::new(value)), most, least_size: 2 })
            }
            "object" => Some(Self::object(schema, is_resource)),
            "" if is_resource => Some(Self::object(schema, is_resource)),
            _ => None,
        }
    }

    /// What is declared of a part of a schema.
    pub fn read_inner(schema: &Value) -> Option<Self> {
        Self::read(schema, schema["x-kubernetes-embedded-resource"] == true)
    }

    fn text(schema: &Value) -> Self {
        let given = schema["maxLength"].as_i64().map(|most| u64::try_from(most).unwrap_or(0));
        let (shape, most, least_size) = match schema.str_at(&["format"]) {
            "byte" => (Shape::Bytes, given.unwrap_or(LARGEST - 2), 2),
            "duration" => (Shape::Duration, 32, 3),
            "date" => (Shape::Date, 12, 12),
            "date-time" => (Shape::DateTime, 32, 21),
            _ => {
                let longest = schema.list_at(&["enum"]).iter().filter_map(Value::as_str).map(|text| text.len() as u64);
                // A letter takes up to four bytes.
                let most = given.map(|most| most.saturating_mul(4)).or(longest.max()).unwrap_or(LARGEST - 2);
                (Shape::Text, most, 2)
            }
        };
        Self { shape, most, least_size }
    }

    fn list(items: &Value, schema: &Value, most: Option<u64>) -> Option<Self> {
        let item = Self::read_inner(items).filter(|_| items.is_object())?;
        let most = most.unwrap_or((LARGEST - 2) / (item.least_size + 1));
        let escaped = |key: &Value| {
            let key = key.as_str()?;
            Some(escape(key).map_or_else(|| key.to_owned(), |escaped| escaped.into_owned()))
        };
        let keys = match schema.str_at(&["x-kubernetes-list-type"]) {
            "set" => Some(vec![]),
            "map" => Some(schema.list_at(&["x-kubernetes-list-map-keys"]).iter().filter_map(escaped).collect()),
            _ => None,
        };
        Some(Self { shape: Shape::List { item: Box::new(item), keys }, most, least_size: 2 })
    }

    fn object(schema: &Value, is_resource: bool) -> Self {
        let mut fields = BTreeMap::new();
        let mut least_size = 2;
        let required = schema.list_at(&["required"]);
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let Some(declared) = Self::read_inner(property) else { continue };
            if required.iter().any(|required| required == name) && property["default"].is_null() {
                least_size += name.len() as u64 + declared.least_size + 4;
            }
            fields.insert(name.clone(), declared);
        }
        if is_resource {
            let text = || Self { shape: Shape::Text, most: LARGEST - 2, least_size: 2 };
            let names = ["name", "generateName"].into_iter().map(|name| (name.to_owned(), text())).collect();
            fields.insert("kind".into(), text());
            fields.insert("apiVersion".into(), text());
            fields.insert("metadata".into(), Self { shape: Shape::Object(names), most: 0, least_size: 2 });
        }
        Self { shape: Shape::Object(fields), most: 0, least_size }
    }

    /// How often a value can be in an object, when nothing around it is bounded.
    pub fn most_often(&self) -> u64 {
        LARGEST / (self.least_size + 1)
    }

    /// The type of the values, for checks before anything is evaluated.
    pub fn type_of(&self) -> Type<'static> {
        match &self.shape {
            Shape::IntOrText => Type::Dyn,
            Shape::Bool => Type::Bool,
            Shape::Int => Type::Int,
            Shape::Double => Type::Double,
            Shape::Text => Type::String,
            Shape::Bytes => Type::Bytes,
            Shape::Duration => Type::Duration,
            Shape::Date | Shape::DateTime => Type::Timestamp,
            Shape::List { item, .. } => Type::List(Box::new(item.type_of())),
            Shape::Map(value) => Type::Map(Box::new(value.type_of())),
            Shape::Object(fields) => {
                let fields =
                    fields.iter().filter_map(|(name, declared)| Some((escape(name)?.into_owned(), declared.type_of())));
                Type::Record(fields.collect())
            }
        }
    }

    /// The part of what is declared that expressions call by this name.
    pub fn field(&self, escaped: &str) -> Option<&Self> {
        let Shape::Object(fields) = &self.shape else { return None };
        fields.get(escaped).or_else(|| {
            fields.iter().find(|(name, _)| escape(name).is_some_and(|own| own == escaped)).map(|(_, field)| field)
        })
    }

    /// A value as expressions see it. What is not as it was declared stays as it is.
    pub fn value(&self, value: &Value) -> Box<dyn Val> {
        self.typed(value).unwrap_or_else(|| from_json(value))
    }

    fn typed(&self, value: &Value) -> Option<Box<dyn Val>> {
        match &self.shape {
            Shape::IntOrText | Shape::Bool | Shape::Int => None,
            Shape::Double => Some(Box::new(CelDouble::from(value.as_f64()?))),
            Shape::Text => Some(Box::new(CelString::from(value.as_str()?.to_owned()))),
            Shape::Bytes => {
                use base64::Engine;
                let decoded = base64::engine::general_purpose::STANDARD.decode(value.as_str()?).ok()?;
                Some(Box::new(CelBytes::from(decoded)))
            }
            Shape::Duration => convert("duration", value.as_str()?),
            Shape::Date => convert("timestamp", &format!("{}T00:00:00Z", value.as_str()?)),
            Shape::DateTime => convert("timestamp", value.as_str()?),
            Shape::List { item, keys } => {
                let items: Vec<Box<dyn Val>> = value.as_array()?.iter().map(|value| item.value(value)).collect();
                Some(match keys {
                    Some(keys) => Box::new(KeyedList::new(items, keys.clone())),
                    None => Box::new(CelList::from(items)),
                })
            }
            Shape::Map(inner) => {
                let members = value.as_object()?.iter();
                Some(map(members.map(|(key, value)| (key.clone(), inner.value(value)))))
            }
            Shape::Object(fields) => {
                // A null is as good as nothing.
                let members = value.as_object()?.iter().filter(|(_, value)| !value.is_null());
                Some(map(members.map(|(name, value)| {
                    let value = fields.get(name).map_or_else(|| from_json(value), |field| field.value(value));
                    (escape(name).map_or_else(|| name.clone(), |escaped| escaped.into_owned()), value)
                })))
            }
        }
    }
}
