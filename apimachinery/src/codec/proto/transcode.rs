//! JSON text to protobuf in one pass, without a tree in between: how a stored object gets its message. It trusts that
//! the text is JSON of the schema's kind (it was written by this program); on anything else it answers with an error.
//!
//! The fields of a message come in the order of the text, which every reader of protobuf accepts; lists keep theirs.

use serde_json::Value;

use super::encode;
use super::wire::{MAX_DEPTH, bytes_field, nested, varint_field};
use super::{ProtoError, encode::is_message};
use crate::codec::scan::{ScanError, skip_space, skip_string, skip_value};
use crate::schema::{Field, Object, Scalar, Schema, Shape};

type Result<T = ()> = std::result::Result<T, ProtoError>;

/// The message of the object that `text` is; fields that the schema does not know are left out.
pub fn message(schema: &Schema, text: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let mut text = Text { text, at: 0, depth: 0 };
    text.body(&mut out, schema, "")?;
    Ok(out)
}

/// A place in the text.
struct Text<'t> {
    text: &'t [u8],
    at: usize,
    depth: usize,
}

/// What the fields of structs that Go inlines make, by the numbers that lead to them (0: none).
type Inlined = Vec<([u16; 2], Vec<u8>)>;

impl<'t> Text<'t> {
    /// The next byte that is no space.
    fn peek(&mut self) -> Result<u8> {
        self.at = skip_space(self.text, self.at);
        self.text.get(self.at).copied().ok_or(ProtoError::Text(ScanError(self.at)))
    }

    fn expect(&mut self, byte: u8) -> Result {
        if self.peek()? != byte {
            return Err(ProtoError::Text(ScanError(self.at)));
        }
        self.at += 1;
        Ok(())
    }

    /// The next value as it is written.
    fn value(&mut self) -> Result<&'t [u8]> {
        self.peek()?;
        let start = self.at;
        self.at = skip_value(self.text, start)?;
        Ok(&self.text[start..self.at])
    }

    /// The next value as a tree, for what is rare or small.
    fn tree(&mut self) -> Result<Value> {
        serde_json::from_slice(self.value()?).map_err(ProtoError::Json)
    }

    /// The next string, which is looked at in place when nothing in it is escaped.
    fn string<T>(&mut self, see: impl FnOnce(&[u8]) -> T) -> Result<T> {
        self.peek()?;
        let start = self.at;
        self.at = skip_string(self.text, start)?;
        let quoted = &self.text[start..self.at];
        let bare = &quoted[1..quoted.len() - 1];
        if !bare.contains(&b'\\') {
            return Ok(see(bare));
        }
        let text: String = serde_json::from_slice(quoted).map_err(ProtoError::Json)?;
        Ok(see(text.as_bytes()))
    }

    /// Whether the next value is null, which is then behind us.
    fn is_null(&mut self) -> Result<bool> {
        let is_null = self.peek()? == b'n';
        if is_null {
            self.value()?;
        }
        Ok(is_null)
    }

    /// Goes through an object or a list; `item` is called where each member or element begins.
    fn each(&mut self, open: u8, close: u8, mut item: impl FnMut(&mut Self) -> Result) -> Result {
        self.expect(open)?;
        if self.depth == MAX_DEPTH {
            return Err(ProtoError::TooDeep);
        }
        self.depth += 1;
        let mut first = true;
        while self.peek()? != close {
            if !std::mem::replace(&mut first, false) {
                self.expect(b',')?;
            }
            item(self)?;
        }
        self.at += 1;
        self.depth -= 1;
        Ok(())
    }

    /// The content of a value that is a message.
    fn body(&mut self, out: &mut Vec<u8>, schema: &Schema, name: &str) -> Result {
        match &schema.shape {
            Shape::Object(object) => {
                if self.is_null()? {
                    return Ok(());
                }
                self.object(out, object)
            }
            Shape::List(list) => self.each(b'[', b']', |text| text.single(out, 1, &list.item, name)),
            Shape::Opaque(_) => {
                let raw = self.value()?;
                if raw != b"null" {
                    bytes_field(out, 1, raw);
                }
                Ok(())
            }
            Shape::PropsOr(_) | Shape::Scalar(_) => encode::body(out, schema, &self.tree()?, name),
            Shape::Map(_) => Err(ProtoError::Value(name.to_owned())),
        }
    }

    fn object(&mut self, out: &mut Vec<u8>, object: &Object) -> Result {
        let mut inlined = Inlined::new();
        self.each(b'{', b'}', |text| {
            let field = text.string(|key| std::str::from_utf8(key).ok().and_then(|key| object.field(key)))?;
            text.expect(b':')?;
            match field.filter(|field| field.numbers[0] > 0) {
                Some(field) => text.member(out, &mut inlined, field),
                None => text.value().map(drop),
            }
        })?;
        put_inlined(out, inlined)
    }

    fn member(&mut self, out: &mut Vec<u8>, inlined: &mut Inlined, field: &Field) -> Result {
        if self.is_null()? {
            return Ok(());
        }
        let (outer, number) = match field.numbers {
            [number, 0, _] => return self.field(out, number, field),
            [outer, number, 0] => ([outer, 0], number),
            [outer, inner, number] => ([outer, inner], number),
        };
        let known = inlined.iter().position(|(path, _)| *path == outer);
        let index = known.unwrap_or_else(|| {
            inlined.push((outer, Vec::new()));
            inlined.len() - 1
        });
        self.field(&mut inlined[index].1, number, field)
    }

    fn field(&mut self, out: &mut Vec<u8>, number: u16, field: &Field) -> Result {
        let name = &*field.name;
        match &field.schema.shape {
            Shape::List(list) if !list.wrapped => {
                self.each(b'[', b']', |text| text.single(out, number, &list.item, name))
            }
            Shape::Map(map) => self.each(b'{', b'}', |text| {
                nested(out, number, |out| {
                    text.string(|key| bytes_field(out, 1, key))?;
                    text.expect(b':')?;
                    text.single(out, 2, &map.value, name)
                })
            }),
            _ => self.single(out, number, &field.schema, name),
        }
    }

    fn single(&mut self, out: &mut Vec<u8>, number: u16, schema: &Schema, name: &str) -> Result {
        match &schema.shape {
            Shape::Scalar(scalar) if !is_message(*scalar) => self.scalar(out, number, *scalar, name),
            _ => nested(out, number, |out| self.body(out, schema, name)),
        }
    }

    fn scalar(&mut self, out: &mut Vec<u8>, number: u16, scalar: Scalar, name: &str) -> Result {
        let misfit = || ProtoError::Value(name.to_owned());
        match (scalar, self.peek()?) {
            (Scalar::String, b'"') => self.string(|text| bytes_field(out, number, text)),
            (Scalar::Bool, b't' | b'f') => {
                varint_field(out, number, i64::from(self.value()? == b"true"));
                Ok(())
            }
            (Scalar::Int32 | Scalar::Int64, b'-' | b'0'..=b'9') => {
                let digits = std::str::from_utf8(self.value()?).ok().and_then(|digits| digits.parse().ok());
                varint_field(out, number, digits.ok_or_else(misfit)?);
                Ok(())
            }
            _ => encode::scalar_field(out, number, scalar, &self.tree()?, name),
        }
    }
}

/// Each outer message once, with all that is in it.
fn put_inlined(out: &mut Vec<u8>, mut inlined: Inlined) -> Result {
    inlined.sort_by_key(|(path, _)| *path);
    for group in inlined.chunk_by(|(a, _), (b, _)| a[0] == b[0]) {
        nested(out, group[0].0[0], |out| {
            for ([_, inner], content) in group {
                match inner {
                    0 => out.extend_from_slice(content),
                    inner => bytes_field(out, *inner, content),
                }
            }
            Ok::<_, ProtoError>(())
        })?;
    }
    Ok(())
}
