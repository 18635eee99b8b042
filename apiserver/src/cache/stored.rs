//! One stored object: encoded once, shared by every reader.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use apimachinery::codec::scan::{self, Member, Outline, ScanError};
use apimachinery::schema::Schema;
use bytes::Bytes;
use serde_json::{Map, Value};

/// An object at one revision. `body` is its JSON without the braces, `kind` and `apiVersion`, with
/// `metadata.resourceVersion` in place, so that every answer is a header, the body and a brace.
#[derive(Debug)]
pub struct Stored {
    /// The key in the store, `/registry/pods/default/a`.
    pub key: Arc<str>,
    pub revision: u64,
    pub body: Bytes,
    pub meta: Extracted,
    pub kind: Arc<KindInfo>,
    /// The protobuf message in the storage version, made when first asked for.
    message: OnceLock<Option<Bytes>>,
}

/// Labels in the object's order, as compact as they can be kept.
pub type Labels = Box<[(Box<str>, Box<str>)]>;

/// What selection, the garbage collector's graph and the indexes need, read once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extracted {
    pub name: Box<str>,
    pub namespace: Box<str>,
    pub uid: Box<str>,
    pub labels: Labels,
    /// A few bits for each label; an object that lacks one of a label's bits lacks the label.
    pub label_marks: u64,
    /// Uids of the owner references.
    pub owners: Box<[Box<str>]>,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// The kind's selectable fields, in the order in which its strategy names them.
    pub fields: Box<[Box<str>]>,
    /// The version that the object is stored in, when it is not the storage version and that matters.
    pub stored_as: Option<Box<str>>,
}

/// Names of selectable fields, each with the dotted paths of what it stands for.
pub type Aliases = &'static [(&'static str, &'static [&'static str])];

/// What all objects of one resource have in common in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindInfo {
    /// Kind and apiVersion of the storage version.
    pub kind: String,
    pub api_version: String,
    /// Dotted paths of the selectable fields, with the value that stands for an absent one.
    pub fields: Vec<(Cow<'static, str>, &'static str)>,
    /// Where fields are that are not at the path of their own name: the first of the paths with a value counts.
    pub aliases: Aliases,
    /// Which of `fields` watchers are indexed by.
    pub indexed: Option<usize>,
    /// Of a custom resource whose schema has defaults: they also apply to what was stored before they were declared.
    pub defaults: Option<Defaults>,
    /// Another server converts between the versions, so that it matters which one an object was stored in.
    pub converted: bool,
}

impl KindInfo {
    /// The value of a selectable field.
    fn field(&self, object: &mut Outline<'_>, path: &str, absent: &str) -> Box<str> {
        let mut at = |path| object.find(path).and_then(scan::scalar);
        let value = match self.aliases.iter().find(|(name, _)| *name == path) {
            Some((_, paths)) => paths.iter().filter_map(|path| at(path)).find(|value| !value.is_empty()),
            None => at(path),
        };
        value.as_deref().unwrap_or(absent).into()
    }
}

/// A schema with defaults, and the text that it was made from, which tells it from others.
#[derive(Clone, Debug)]
pub struct Defaults {
    pub schema: Arc<Schema>,
    pub text: String,
}

impl PartialEq for Defaults {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Defaults {}

#[derive(Debug, thiserror::Error)]
pub enum DecodeStoredError {
    #[error("the stored value is not an object")]
    Scan(#[from] ScanError),
    #[error("the stored protobuf cannot be read")]
    Protobuf(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the stored value has no metadata")]
    NoMetadata,
    #[error("the stored value is not text")]
    NotText,
}

impl Stored {
    /// Reads what the store holds under `key`: JSON, or upstream's protobuf.
    pub fn decode(kind: &Arc<KindInfo>, key: &str, value: &[u8], revision: u64) -> Result<Self, DecodeStoredError> {
        if value.starts_with(b"k8s\0") {
            let mut tree = apimachinery::codec::proto::decode_object(value)
                .map_err(|error| DecodeStoredError::Protobuf(Box::new(error)))?;
            // Protobuf leaves out what JSON always has.
            if let Some(schema) = apimachinery::schema::builtin().kind_of_object(&kind.api_version, &kind.kind) {
                apimachinery::codec::complete(&mut tree, schema);
            }
            return Self::from_json(kind, key, tree.to_string().as_bytes(), revision);
        }
        if let Some(defaults) = &kind.defaults
            && let Ok(mut tree) = serde_json::from_slice::<Value>(value)
        {
            defaults.schema.apply_defaults(&mut tree);
            return Self::from_json(kind, key, tree.to_string().as_bytes(), revision);
        }
        Self::from_json(kind, key, value, revision)
    }

    /// The header goes, the revision comes in, the metadata is read; no part of the text is walked more than twice.
    fn from_json(kind: &Arc<KindInfo>, key: &str, json: &[u8], revision: u64) -> Result<Self, DecodeStoredError> {
        let mut outline = Outline::read(json)?;
        let mut body = Vec::with_capacity(json.len() + 32);
        let mut meta = None;
        let mut stored_as = None;
        for member in outline.members() {
            if kind.converted && member.key == b"apiVersion" {
                let version = serde_json::from_slice::<Box<str>>(member.value).ok();
                stored_as = version.filter(|version| **version != *kind.api_version);
            }
            if matches!(member.key, b"kind" | b"apiVersion") {
                continue;
            }
            if !body.is_empty() {
                body.push(b',');
            }
            push_key(&mut body, member.key);
            if member.key == b"metadata" {
                let members = members(member.value)?;
                meta = Some(Extracted::read(&members)?);
                push_metadata(&mut body, &members, revision);
            } else {
                body.extend_from_slice(member.value);
            }
        }
        let mut meta = meta.ok_or(DecodeStoredError::NoMetadata)?;
        meta.stored_as = stored_as;
        meta.fields = kind.fields.iter().map(|(path, absent)| kind.field(&mut outline, path, absent)).collect();
        if std::str::from_utf8(&body).is_err() {
            return Err(DecodeStoredError::NotText);
        }
        body.shrink_to_fit();
        Ok(Self { key: key.into(), revision, body: body.into(), meta, kind: kind.clone(), message: OnceLock::new() })
    }

    /// The same object with the revision of a later change, as the last state in a deletion.
    pub fn at_revision(&self, revision: u64) -> Result<Self, DecodeStoredError> {
        Self::from_json(&self.kind, &self.key, &self.braced(), revision)
    }

    pub fn name(&self) -> &str {
        &self.meta.name
    }

    pub fn namespace(&self) -> &str {
        &self.meta.namespace
    }

    pub fn uid(&self) -> &str {
        &self.meta.uid
    }

    pub fn label(&self, name: &str) -> Option<&str> {
        self.meta.labels.iter().find(|(key, _)| &**key == name).map(|(_, value)| &**value)
    }

    /// The value of a selectable field; `None` when the kind has no such field.
    pub fn field(&self, path: &str) -> Option<&str> {
        match path {
            "metadata.name" => Some(self.name()),
            "metadata.namespace" => Some(self.namespace()),
            _ => {
                let index = self.kind.fields.iter().position(|(name, _)| *name == path)?;
                self.meta.fields.get(index).map(|value| &**value)
            }
        }
    }

    /// The value of the field that watchers are indexed by.
    pub(super) fn index_value(&self) -> Option<&str> {
        self.meta.fields.get(self.kind.indexed?).map(|value| &**value)
    }

    /// The object as a tree, with `kind` and `apiVersion` of the storage version.
    pub fn value(&self) -> Value {
        let mut map: Map<String, Value> = serde_json::from_slice(&self.braced()).unwrap_or_else(|error| {
            tracing::error!(key = %self.key, %error, "a cached object does not parse");
            Map::new()
        });
        map.insert("kind".into(), self.kind.kind.as_str().into());
        let api_version = self.meta.stored_as.as_deref().unwrap_or(&self.kind.api_version);
        map.insert("apiVersion".into(), api_version.into());
        Value::Object(map)
    }

    /// The object's protobuf message in the storage version, without an envelope; `None` when it has none.
    pub fn message(&self) -> Option<Bytes> {
        let encoded = self.message.get_or_init(|| {
            let kind = &self.kind;
            let schema = apimachinery::schema::builtin().kind_of_object(&kind.api_version, &kind.kind)?;
            match apimachinery::codec::proto::transcode_message(schema, &self.braced()) {
                Ok(bytes) => Some(bytes.into()),
                Err(error) => {
                    tracing::warn!(key = %self.key, %error, "an object has no protobuf form");
                    None
                }
            }
        });
        encoded.clone()
    }

    /// The message in its envelope.
    pub fn protobuf(&self) -> Option<Bytes> {
        let message = self.message()?;
        Some(apimachinery::codec::proto::envelope(&self.kind.api_version, &self.kind.kind, &message).into())
    }

    fn braced(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(self.body.len() + 2);
        text.push(b'{');
        text.extend_from_slice(&self.body);
        text.push(b'}');
        text
    }
}

/// The whole object as JSON, out of what was written to the store at this revision.
pub fn whole(value: &Bytes, revision: u64) -> Result<Bytes, DecodeStoredError> {
    let mut text = Vec::with_capacity(value.len() + 40);
    text.push(b'{');
    for member in scan::members(value)? {
        let member = member?;
        if text.len() > 1 {
            text.push(b',');
        }
        push_key(&mut text, member.key);
        if member.key == b"metadata" {
            push_metadata(&mut text, &members(member.value)?, revision);
        } else {
            text.extend_from_slice(member.value);
        }
    }
    text.extend_from_slice(b"}\n");
    Ok(text.into())
}

impl Extracted {
    fn read(metadata: &[Member<'_>]) -> Result<Self, ScanError> {
        let mut meta = Self::default();
        for member in metadata {
            let text = || scan::scalar(member.value).as_deref().unwrap_or_default().into();
            match member.key {
                b"name" => meta.name = text(),
                b"namespace" => meta.namespace = text(),
                b"uid" => meta.uid = text(),
                b"deletionTimestamp" => meta.deleting = member.value != b"null",
                b"labels" if member.value.starts_with(b"{") => meta.labels = labels(member.value)?,
                b"ownerReferences" => {
                    meta.owners = scan::elements(member.value)
                        .into_iter()
                        .filter_map(|owner| Some(scan::scalar(scan::find(owner, ["uid"])?)?.as_ref().into()))
                        .collect();
                }
                _ => {}
            }
        }
        meta.label_marks = label_marks(meta.labels.iter().map(|(key, value)| (&**key, &**value)));
        Ok(meta)
    }
}

/// Two of 64 bits for each label, all together.
pub fn label_marks<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>) -> u64 {
    labels.fold(0, |marks, (key, value)| {
        let bytes = key.bytes().chain([b'=']).chain(value.bytes());
        // FNV-1a: short, and the same in every run; what it lacks is that the last bytes reach the upper bits.
        let hash = bytes
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let hash = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        marks | 1 << (hash >> 58) | 1 << (hash >> 52 & 63)
    })
}

fn labels(text: &[u8]) -> Result<Labels, ScanError> {
    scan::members(text)?
        .map(|member| {
            let member = member?;
            let value = scan::scalar(member.value).unwrap_or_default();
            Ok((String::from_utf8_lossy(member.key).as_ref().into(), value.as_ref().into()))
        })
        .collect()
}

fn members(text: &[u8]) -> Result<Vec<Member<'_>>, ScanError> {
    scan::members(text)?.collect()
}

fn push_key(out: &mut Vec<u8>, key: &[u8]) {
    out.push(b'"');
    out.extend_from_slice(key);
    out.extend_from_slice(b"\":");
}

/// The metadata with `resourceVersion` being this revision.
fn push_metadata(out: &mut Vec<u8>, members: &[Member<'_>], revision: u64) {
    out.extend_from_slice(b"{\"resourceVersion\":\"");
    out.extend_from_slice(revision.to_string().as_bytes());
    out.push(b'"');
    for member in members.iter().filter(|member| member.key != b"resourceVersion") {
        out.push(b',');
        push_key(out, member.key);
        out.extend_from_slice(member.value);
    }
    out.push(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_header_goes_and_the_revision_comes_in() {
        let kind = Arc::new(KindInfo {
            defaults: None,
            converted: false,
            kind: "Pod".into(),
            api_version: "v1".into(),
            fields: vec![
                ("spec.nodeName".into(), ""),
                ("spec.hostNetwork".into(), "false"),
                ("place".into(), "nowhere"),
            ],
            aliases: &[("place", &["spec.place", "spec.nodeName"])],
            indexed: Some(0),
        });
        let text =
            br#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"a","namespace":"d","uid":"u","labels":{"x":"y"},
            "resourceVersion":"1","ownerReferences":[{"uid":"o"}]},"spec":{"nodeName":"n"}}"#;
        let stored = Stored::decode(&kind, "/registry/pods/d/a", text, 7).expect("decodes");
        assert_eq!(
            (
                stored.name(),
                stored.namespace(),
                stored.uid(),
                stored.label("x"),
                stored.field("spec.nodeName"),
                stored.field("spec.hostNetwork")
            ),
            ("a", "d", "u", Some("y"), Some("n"), Some("false"))
        );
        assert_eq!(stored.field("place"), Some("n"), "the second path of the alias has a value");
        assert_eq!(&*stored.meta.owners, &["o".into()]);
        assert!(stored.body.starts_with(br#""metadata":{"resourceVersion":"7","name":"a""#));
        let later = stored.at_revision(9).expect("again");
        assert_eq!(later.value()["metadata"]["resourceVersion"], json!("9"));
        assert_eq!(later.value()["apiVersion"], json!("v1"));
    }

    #[test]
    fn labels_that_differ_in_a_digit_have_marks_of_their_own() {
        let values: Vec<String> = (0..100).map(|value| value.to_string()).collect();
        let marks: std::collections::HashSet<u64> =
            values.iter().map(|v| label_marks([("pct", v.as_str())].into_iter())).collect();
        assert!(marks.len() > 80, "{} of 100", marks.len());
    }

    #[test]
    fn what_was_written_is_answered_with_its_revision() {
        let written = Bytes::from(r#"{"apiVersion":"v1","data":{"metadata":{}},"kind":"X","metadata":{"name":"a"}}"#);
        let text = whole(&written, 7).expect("an object");
        let expected = json!({"apiVersion": "v1", "data": {"metadata": {}}, "kind": "X",
            "metadata": {"name": "a", "resourceVersion": "7"}});
        assert_eq!(serde_json::from_slice::<Value>(&text).expect("JSON"), expected);
        assert!(whole(&Bytes::from_static(b"[]"), 7).is_err());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let kind = Arc::default();
        for text in [&b"[]"[..], b"{}", b"", b"{\"metadata\":1}"] {
            assert!(Stored::decode(&kind, "k", text, 1).is_err());
        }
    }
}
