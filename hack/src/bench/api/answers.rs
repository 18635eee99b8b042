//! What the checks look at in answers, out of JSON and out of protobuf. The protobuf side declares the few fields it
//! needs by number and shares no code with the server, so that a mistake there cannot hide itself here.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use prost::Message;
use serde::Deserialize;

use super::client::PROTOBUF;

/// What matters of one object.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Item {
    pub name: String,
    pub uid: String,
    pub version: u64,
    pub node: String,
    pub percent: String,
    pub annotations: BTreeMap<String, String>,
}

/// What matters of a list.
#[derive(Debug, Default)]
pub struct List {
    pub version: u64,
    pub items: Vec<Item>,
}

/// What matters of a watch event.
#[derive(Debug)]
pub struct Event {
    pub kind: String,
    pub item: Item,
}

pub fn list(accept: &str, body: &Bytes) -> Result<List> {
    if accept == PROTOBUF { proto_list(body) } else { json_list(body) }
}

pub fn item(accept: &str, body: &Bytes) -> Result<Item> {
    if accept == PROTOBUF { proto_item(&unwrap(body, "Pod")?) } else { json::<JsonItem>(body)?.into_item() }
}

/// One event of a stream: the line, or the message without its length.
pub fn event(is_protobuf: bool, text: &Bytes) -> Result<Event> {
    if is_protobuf {
        let event = ProtoEvent::decode(text.clone()).context("a watch event is malformed")?;
        let object = event.object.unwrap_or_default().raw;
        return Ok(Event { kind: event.kind, item: proto_item(&unwrap(&object, "Pod")?)? });
    }
    let event: JsonEvent = json(text)?;
    Ok(Event { kind: event.kind.into_owned(), item: event.object.into_item()? })
}

/// The resource version in the metadata of any object or list.
pub fn version(body: &Bytes) -> Result<u64> {
    Ok(json::<JsonItem>(body)?.into_item()?.version)
}

pub fn json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T> {
    serde_json::from_slice(body)
        .with_context(|| format!("unexpected JSON: {}", String::from_utf8_lossy(&body[..body.len().min(300)])))
}

fn number(version: &str) -> Result<u64> {
    version.parse().with_context(|| format!("resourceVersion {version:?} is no number"))
}

#[derive(Deserialize)]
struct JsonList<'a> {
    #[serde(borrow)]
    kind: Cow<'a, str>,
    metadata: JsonMeta<'a>,
    items: Vec<JsonItem<'a>>,
}

#[derive(Deserialize)]
struct JsonEvent<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    object: JsonItem<'a>,
}

#[derive(Deserialize)]
struct JsonItem<'a> {
    #[serde(borrow)]
    metadata: JsonMeta<'a>,
    #[serde(default)]
    spec: JsonSpec<'a>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct JsonMeta<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    uid: Cow<'a, str>,
    resource_version: Cow<'a, str>,
    labels: HashMap<Cow<'a, str>, Cow<'a, str>>,
    annotations: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct JsonSpec<'a> {
    #[serde(borrow)]
    node_name: Cow<'a, str>,
}

impl JsonItem<'_> {
    fn into_item(self) -> Result<Item> {
        Ok(Item {
            name: self.metadata.name.into_owned(),
            uid: self.metadata.uid.into_owned(),
            version: number(&self.metadata.resource_version)?,
            node: self.spec.node_name.into_owned(),
            percent: self.metadata.labels.get("pct").map(|value| value.to_string()).unwrap_or_default(),
            annotations: self.metadata.annotations,
        })
    }
}

fn json_list(body: &[u8]) -> Result<List> {
    let list: JsonList = json(body)?;
    ensure!(list.kind == "PodList", "the list is a {}", list.kind);
    let items = list.items.into_iter().map(JsonItem::into_item).collect::<Result<_>>()?;
    Ok(List { version: number(&list.metadata.resource_version)?, items })
}

#[derive(Message)]
struct ProtoUnknown {
    #[prost(message, optional, tag = "1")]
    type_meta: Option<ProtoTypeMeta>,
    #[prost(bytes = "bytes", tag = "2")]
    raw: Bytes,
}

#[derive(Message)]
struct ProtoTypeMeta {
    #[prost(string, tag = "2")]
    kind: String,
}

#[derive(Message)]
struct ProtoList {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ProtoListMeta>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    items: Vec<Bytes>,
}

#[derive(Message)]
struct ProtoListMeta {
    #[prost(string, tag = "2")]
    resource_version: String,
}

#[derive(Message)]
struct ProtoEvent {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(message, optional, tag = "2")]
    object: Option<ProtoRaw>,
}

#[derive(Message)]
struct ProtoRaw {
    #[prost(bytes = "bytes", tag = "1")]
    raw: Bytes,
}

#[derive(Message)]
struct ProtoPod {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ProtoMeta>,
    #[prost(message, optional, tag = "2")]
    spec: Option<ProtoSpec>,
}

#[derive(Message)]
struct ProtoMeta {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "5")]
    uid: String,
    #[prost(string, tag = "6")]
    resource_version: String,
    #[prost(map = "string, string", tag = "11")]
    labels: HashMap<String, String>,
    #[prost(btree_map = "string, string", tag = "12")]
    annotations: BTreeMap<String, String>,
}

#[derive(Message)]
struct ProtoSpec {
    #[prost(string, tag = "10")]
    node_name: String,
}

/// The message inside the envelope that says what it is.
fn unwrap(body: &Bytes, kind: &str) -> Result<Bytes> {
    let Some(b"k8s\0") = body.get(..4) else { bail!("the answer is no Kubernetes protobuf") };
    let unknown = ProtoUnknown::decode(body.slice(4..)).context("the envelope is malformed")?;
    let found = unknown.type_meta.unwrap_or_default().kind;
    ensure!(found == kind, "the answer is a {found}, not a {kind}");
    Ok(unknown.raw)
}

fn proto_item(message: &Bytes) -> Result<Item> {
    let pod = ProtoPod::decode(message.clone()).context("a pod is malformed")?;
    let metadata = pod.metadata.unwrap_or_default();
    Ok(Item {
        version: number(&metadata.resource_version)?,
        percent: metadata.labels.get("pct").cloned().unwrap_or_default(),
        name: metadata.name,
        uid: metadata.uid,
        node: pod.spec.unwrap_or_default().node_name,
        annotations: metadata.annotations,
    })
}

fn proto_list(body: &Bytes) -> Result<List> {
    let list = ProtoList::decode(unwrap(body, "PodList")?).context("the list is malformed")?;
    let items = list.items.iter().map(proto_item).collect::<Result<_>>()?;
    Ok(List { version: number(&list.metadata.unwrap_or_default().resource_version)?, items })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_encodings_say_the_same() {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "uid": "u", "resourceVersion": "7", "labels": {"pct": "p01"}, "annotations": {"x": "y"}},
            "spec": {"nodeName": "n", "containers": []},
        });
        let text = Bytes::from(object.to_string());
        let message = Bytes::from(apimachinery::codec::proto::encode_object(&object).unwrap());
        let expected = item("application/json", &text).unwrap();
        assert_eq!((expected.name.as_str(), expected.version, expected.node.as_str()), ("a", 7, "n"));
        assert_eq!(item(PROTOBUF, &message).unwrap(), expected);
        let event_message = apimachinery::codec::proto::encode_watch_event("ADDED", &object).unwrap();
        let seen = event(true, &event_message.into()).unwrap();
        assert_eq!((seen.kind.as_str(), seen.item), ("ADDED", expected));
    }

    #[test]
    fn what_is_something_else_is_an_error() {
        for body in ["", "{}", r#"{"kind":"Status","metadata":{},"items":[]}"#] {
            assert!(list("application/json", &Bytes::from(body)).is_err(), "{body}");
        }
        assert!(list(PROTOBUF, &Bytes::from_static(b"k8s\0")).is_err());
        assert!(version(&Bytes::from(r#"{"metadata":{"resourceVersion":"x"}}"#)).is_err());
    }
}
