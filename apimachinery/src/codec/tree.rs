//! Builds a `Value` from any serde format while noting duplicate fields, which a plain `Value` would swallow, and
//! leaving out fields that the schema does not know, which then cost no memory. Complaints come in the order of the
//! document.

use std::fmt::{self, Write};

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::MAX_STRICT_ERRORS;
use crate::schema::Schema;

/// Where the parser is and what it complains about. The last one of duplicates wins, as in upstream.
#[derive(Debug, Default)]
pub struct Builder {
    path: String,
    /// `duplicate field "a.b"`, `unknown field "a.c"`
    pub complaints: Vec<String>,
}

impl Builder {
    pub fn build<'de, D: Deserializer<'de>>(
        &mut self,
        deserializer: D,
        schema: Option<&Schema>,
    ) -> Result<Value, D::Error> {
        Seed { builder: self, schema }.deserialize(deserializer)
    }

    fn complain(&mut self, what: &str) {
        if self.complaints.len() < MAX_STRICT_ERRORS {
            self.complaints.push(format!("{what} field {:?}", self.path));
        }
    }
}

struct Seed<'a> {
    builder: &'a mut Builder,
    schema: Option<&'a Schema>,
}

impl Seed<'_> {
    /// Whether the schema has no place for this field.
    fn is_unknown(&self, name: &str) -> bool {
        let object = self.schema.and_then(Schema::as_object);
        object.is_some_and(|o| !o.preserve_unknown && o.field(name).is_none())
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value that JSON can express")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_bool<E: Error>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("a number must be finite"))
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E: Error>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        let Self { builder, schema } = self;
        let (length, schema) = (builder.path.len(), schema.and_then(Schema::item));
        loop {
            let _ = write!(builder.path, "[{}]", items.len());
            let item = seq.next_element_seed(Seed { builder: &mut *builder, schema });
            builder.path.truncate(length);
            match item? {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        let length = self.builder.path.len();
        while let Some(key) = access.next_key::<String>()? {
            if length > 0 {
                self.builder.path.push('.');
            }
            self.builder.path.push_str(&key);
            if self.is_unknown(&key) {
                self.builder.complain("unknown");
                access.next_value::<IgnoredAny>()?;
            } else {
                if map.contains_key(&key) {
                    self.builder.complain("duplicate");
                }
                let schema = self.schema.and_then(|schema| schema.child(&key));
                let value = access.next_value_seed(Seed { builder: &mut *self.builder, schema })?;
                map.insert(key, value);
            }
            self.builder.path.truncate(length);
        }
        Ok(Value::Object(map))
    }
}
