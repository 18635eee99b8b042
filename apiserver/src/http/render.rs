//! From stored objects to response bodies. The common case — JSON in the storage version — copies bytes and runs no
//! serializer; everything else goes through a tree.

use std::sync::Arc;

use apimachinery::codec;
use apimachinery::meta::GroupVersionKind;
use apimachinery::status::{Result, Status};
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderValue, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};

use super::compress::{self, Gzip};
use super::negotiate::{self, Encoding, Format, Shape};
use super::table::{self, IncludeObject};
use super::{Body, BodyError, Response, full};
use crate::cache::Stored;
use crate::registry::{Resource, Served};
use crate::verbs::list::List;

/// How much of a list is put together before it is handed to the connection.
const CHUNK: usize = 64 * 1024;

/// How answers about one resource are written.
#[derive(Clone)]
pub struct Renderer {
    pub resource: Arc<Resource>,
    pub served: Arc<Served>,
    pub format: Format,
    pub include: IncludeObject,
    /// The client takes gzip.
    pub gzip: bool,
}

impl Renderer {
    /// The stored bytes can be sent as they are, below the right header.
    pub fn is_verbatim(&self) -> bool {
        self.format.encoding == Encoding::Json
            && self.format.shape == Shape::Object
            && self.served.gvk == self.resource.storage
            && !self.resource.cache.kind().converted
    }

    /// The protobuf messages that the cache keeps can be sent.
    pub fn is_protobuf_verbatim(&self) -> bool {
        self.format.encoding == Encoding::Protobuf
            && self.format.shape == Shape::Object
            && self.served.gvk == self.resource.storage
            && !self.resource.custom
    }

    /// One object that is in the store.
    pub fn stored(&self, object: &Stored) -> Result<Response> {
        if self.is_verbatim() {
            let mut body = BytesMut::with_capacity(object.body.len() + 128);
            self.put_object(&mut body, object);
            body.put_u8(b'\n');
            return Ok(ok(Encoding::Json, full(body.freeze())));
        }
        if self.is_protobuf_verbatim()
            && let Some(bytes) = object.protobuf()
        {
            return Ok(ok(Encoding::Protobuf, full(bytes)));
        }
        self.value(self.shaped(object)?, StatusCode::OK)
    }

    /// `{header,body}`.
    pub fn put_object(&self, out: &mut BytesMut, object: &Stored) {
        out.put_u8(b'{');
        out.extend_from_slice(self.served.header.as_bytes());
        out.put_u8(b',');
        out.extend_from_slice(&object.body);
        out.put_u8(b'}');
    }

    /// The object in the version and shape that was asked for.
    pub fn shaped(&self, object: &Stored) -> Result<Value> {
        match self.format.shape {
            Shape::Metadata(version) => Ok(table::partial_of(object, version)),
            Shape::Object => self.resource.present(&self.served, object.value()),
            Shape::Table(version) => {
                let metadata = json!({"resourceVersion": object.revision.to_string()});
                self.table(version, metadata, std::iter::once(object), true)
            }
        }
    }

    /// A table of stored objects.
    pub fn table<'a>(
        &self,
        version: &str,
        metadata: Value,
        objects: impl Iterator<Item = &'a Stored>,
        columns: bool,
    ) -> Result<Value> {
        let objects = self.resource.present_all(&self.served, objects.map(Stored::value).collect())?.into_iter();
        let api_version = self.served.gvk.api_version();
        let columns = columns.then_some(api_version.as_str());
        Ok(table::table(&*self.resource.strategy, version, metadata, objects, self.include, columns))
    }

    /// The answer to a write. `text` is the object in the storage version, when there is one.
    pub fn written(&self, object: Value, text: Option<Bytes>, code: StatusCode) -> Result<Response> {
        let Some(text) = text.filter(|_| self.is_verbatim()) else {
            return self.object(self.resource.present(&self.served, object)?, code);
        };
        let mut response = self.sized(Encoding::Json, text)?;
        *response.status_mut() = code;
        Ok(response)
    }

    /// An object that is not in the store, in the version that was asked for.
    pub fn object(&self, object: Value, code: StatusCode) -> Result<Response> {
        let shaped = match self.format.shape {
            Shape::Object => object,
            Shape::Metadata(version) => table::partial(&object, version),
            Shape::Table(version) => {
                let api_version = self.served.gvk.api_version();
                let objects = std::iter::once(object);
                table::table(&*self.resource.strategy, version, json!({}), objects, self.include, Some(&api_version))
            }
        };
        self.value(shaped, code)
    }

    fn value(&self, value: Value, code: StatusCode) -> Result<Response> {
        let mut response = self.sized(self.format.encoding, negotiate::encode(self.format.encoding, &value)?)?;
        *response.status_mut() = code;
        Ok(response)
    }

    pub fn list(&self, list: List) -> Result<Response> {
        let metadata = list_metadata(&list, self.resource.custom && !matches!(self.format.shape, Shape::Table(_)));
        if self.is_verbatim() {
            return Ok(self.stream(Encoding::Json, self.json_chunks(list, &metadata)));
        }
        if self.is_protobuf_verbatim()
            && let Some(messages) = list.items.iter().map(|object| object.message()).collect::<Option<Vec<Bytes>>>()
        {
            let lengths = messages.iter().map(Bytes::len);
            let (head, tail) =
                codec::proto::list_frame(&self.list_gvk(), &metadata, lengths).map_err(Status::internal)?;
            let put = |out: &mut BytesMut, message: &Bytes, _: bool| {
                out.extend_from_slice(&codec::proto::item_prefix(message.len()));
                out.extend_from_slice(message);
            };
            let size = head.len() + messages.iter().map(|message| message.len() + 6).sum::<usize>();
            let chunks = Chunks::new(head, messages, put, tail, size);
            return Ok(self.stream(Encoding::Protobuf, chunks));
        }
        let items = list.items.iter().map(|object| &**object);
        match self.format.shape {
            Shape::Table(version) => self.value(self.table(version, metadata, items, true)?, StatusCode::OK),
            Shape::Metadata(version) => {
                let items: Vec<Value> = items.map(|object| table::partial_of(object, version)).collect();
                let value = json!({
                    "kind": "PartialObjectMetadataList",
                    "apiVersion": format!("meta.k8s.io/{version}"),
                    "metadata": metadata,
                    "items": items,
                });
                self.value(value, StatusCode::OK)
            }
            Shape::Object => {
                let items = self.resource.present_all(&self.served, items.map(Stored::value).collect())?;
                self.value_list(&metadata, items)
            }
        }
    }

    /// A list of objects that are trees already.
    pub fn value_list(&self, metadata: &Value, mut items: Vec<Value>) -> Result<Response> {
        if let Shape::Table(version) = self.format.shape {
            let rows = items.into_iter();
            let api_version = self.served.gvk.api_version();
            let strategy = &*self.resource.strategy;
            let table = table::table(strategy, version, metadata.clone(), rows, self.include, Some(&api_version));
            return self.value(table, StatusCode::OK);
        }
        let (kind, api_version) = (&self.served.list_kind, self.served.gvk.api_version());
        if self.format.encoding == Encoding::Protobuf {
            let items: Vec<&Value> = items.iter().collect();
            let bytes = codec::proto::encode_list(&self.list_gvk(), metadata, &items).map_err(Status::internal)?;
            return self.sized(Encoding::Protobuf, bytes.into());
        }
        if !self.resource.custom {
            for map in items.iter_mut().filter_map(Value::as_object_mut) {
                map.remove("kind");
                map.remove("apiVersion");
            }
        }
        self.value(
            json!({"kind": kind, "apiVersion": api_version, "metadata": metadata, "items": items}),
            StatusCode::OK,
        )
    }

    fn list_gvk(&self) -> GroupVersionKind {
        GroupVersionKind { kind: self.served.list_kind.clone().into(), ..self.served.gvk.clone() }
    }

    fn json_chunks(&self, list: List, metadata: &Value) -> impl Iterator<Item = Bytes> + Send + use<> {
        let header = crate::registry::header(&self.served.list_kind, &self.served.gvk.api_version());
        let head = format!("{{{header},\"metadata\":{metadata},\"items\":[").into_bytes();
        let item_header = if self.resource.custom { format!("{{{},", self.served.header) } else { "{".to_owned() };
        let put = move |out: &mut BytesMut, object: &Arc<Stored>, first: bool| {
            if !first {
                out.put_u8(b',');
            }
            out.extend_from_slice(item_header.as_bytes());
            out.extend_from_slice(&object.body);
            out.put_u8(b'}');
        };
        let size = head.len() + list.items.iter().map(|object| object.body.len() + 64).sum::<usize>();
        Chunks::new(head, list.items, put, b"]}\n", size)
    }

    /// A large answer in chunks, so that it never exists as a whole; a small one as it is.
    fn stream(&self, encoding: Encoding, mut chunks: impl Iterator<Item = Bytes> + Send + 'static) -> Response {
        let mut first = Vec::new();
        while first.iter().map(Bytes::len).sum::<usize>() <= compress::THRESHOLD {
            match chunks.next() {
                Some(chunk) => first.push(chunk),
                None if first.len() == 1 => return ok(encoding, full(first.remove(0))),
                None => return ok(encoding, stream_of(first.into_iter().map(Ok))),
            }
        }
        let chunks = first.into_iter().chain(chunks);
        if self.gzip {
            return gzipped(ok(encoding, stream_of(Gzip::new(chunks))));
        }
        ok(encoding, stream_of(chunks.map(Ok)))
    }

    /// A finished body, packed when that pays.
    fn sized(&self, encoding: Encoding, body: Bytes) -> Result<Response> {
        if !self.gzip || body.len() <= compress::THRESHOLD {
            return Ok(ok(encoding, full(body)));
        }
        let mut packed = Vec::new();
        for chunk in Gzip::new(std::iter::once(body)) {
            packed.extend_from_slice(&chunk.map_err(Status::internal)?);
        }
        Ok(gzipped(ok(encoding, full(packed))))
    }
}

fn gzipped(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    headers.append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    response
}

fn stream_of(chunks: impl Iterator<Item = std::io::Result<Bytes>> + Send + 'static) -> Body {
    let frames = chunks.map(|chunk| chunk.map(Frame::data).map_err(BodyError::new));
    BodyExt::boxed_unsync(StreamBody::new(futures::stream::iter(frames)))
}

/// A list as a sequence of chunks of about one size, put together when they are asked for.
struct Chunks<T, P> {
    head: Option<Vec<u8>>,
    items: std::vec::IntoIter<T>,
    /// Appends an item, told whether it is the first.
    put: P,
    tail: &'static [u8],
    /// Of a chunk: about as much as is needed, so that it seldom grows.
    capacity: usize,
    first: bool,
    done: bool,
}

impl<T, P: Fn(&mut BytesMut, &T, bool)> Chunks<T, P> {
    /// `size`: about how large everything is.
    fn new(head: Vec<u8>, items: Vec<T>, put: P, tail: &'static [u8], size: usize) -> Self {
        let capacity = size.min(CHUNK + CHUNK / 4);
        Self { head: Some(head), items: items.into_iter(), put, tail, capacity, first: true, done: false }
    }
}

impl<T, P: Fn(&mut BytesMut, &T, bool)> Iterator for Chunks<T, P> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        if self.done {
            return None;
        }
        let mut chunk = BytesMut::with_capacity(self.capacity);
        if let Some(head) = self.head.take() {
            chunk.extend_from_slice(&head);
        }
        while chunk.len() < CHUNK {
            let Some(item) = self.items.next() else {
                chunk.extend_from_slice(self.tail);
                self.done = true;
                break;
            };
            (self.put)(&mut chunk, &item, std::mem::replace(&mut self.first, false));
        }
        Some(chunk.freeze())
    }
}

/// Lists of custom resources say that they do not go on, too.
fn list_metadata(list: &List, custom: bool) -> Value {
    let mut metadata = json!({"resourceVersion": list.revision.to_string()});
    if custom || !list.continue_token.is_empty() {
        metadata["continue"] = list.continue_token.as_str().into();
    }
    if let Some(remaining) = list.remaining {
        metadata["remainingItemCount"] = remaining.into();
    }
    metadata
}

/// A response with this tree as its body.
pub fn respond(encoding: Encoding, value: &Value, code: StatusCode) -> Result<Response> {
    let mut response = ok(encoding, full(negotiate::encode(encoding, value)?));
    *response.status_mut() = code;
    Ok(response)
}

fn ok(encoding: Encoding, body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(encoding.content_type()));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}
