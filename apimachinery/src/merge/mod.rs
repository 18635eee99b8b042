//! The four ways to change an object by describing the change: JSON patch (RFC 6902), merge patch (RFC 7396),
//! strategic merge patch and server-side apply. All work on `serde_json::Value` trees and know kinds only through the
//! schema; none reads or writes storage.

pub mod apply;
mod fields;
mod json;
mod managed;
pub mod scale;
mod strategic;
mod typed;

pub use fields::FieldSet;
pub use json::{PatchError, json_patch, merge_patch};
pub use strategic::{strategic, supports as supports_strategic};
pub use typed::merge as merge_typed;
