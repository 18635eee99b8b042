//! The HTTP edge of errors: a `Status` as a response.

use apimachinery::status::Status;
use http::{HeaderValue, StatusCode, header};

use super::negotiate::{self, Encoding};
use super::{Response, full};

/// The status as a response body, with `Retry-After` where it says so.
pub fn response(status: &Status, encoding: Encoding) -> Response {
    let value = status.to_json();
    let (encoding, body) = match negotiate::encode(encoding, &value) {
        Ok(body) => (encoding, body),
        Err(_) => (Encoding::Json, value.to_string().into()),
    };
    let mut response = Response::new(full(body));
    *response.status_mut() = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(encoding.content_type()));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
    if seconds > 0 {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    response
}
