//! Defaults of dynamic resource allocation: claims, their templates, slices and taint rules.

use serde_json::Value;

use super::{default, default_zero, each, existing};

/// The spec of a claim.
pub fn claim_spec(spec: &mut Value) {
    existing(spec, "devices", |devices| {
        each(devices, "requests", |request| {
            existing(request, "exactly", exact_request);
            each(request, "firstAvailable", exact_request);
        });
    });
}

pub fn claim(obj: &mut Value) {
    existing(obj, "spec", claim_spec);
    existing(obj, "status", |status| {
        existing(status, "allocation", |allocation| {
            existing(allocation, "devices", |devices| each(devices, "results", tolerations));
        });
    });
}

pub fn claim_template(obj: &mut Value) {
    existing(obj, "spec", |template| existing(template, "spec", claim_spec));
}

fn exact_request(request: &mut Value) {
    default_zero(request, "allocationMode", "ExactCount");
    if request["allocationMode"] == "ExactCount" {
        default_zero(request, "count", 1);
    }
    tolerations(request);
}

fn tolerations(holder: &mut Value) {
    each(holder, "tolerations", |toleration| default_zero(toleration, "operator", "Equal"));
}

/// Taints that do not say when they were added were added now.
pub fn stamp_taints(slice: &mut Value, now: &str) {
    existing(slice, "spec", |spec| {
        existing(spec, "taint", |taint| default(taint, "timeAdded", now));
        each(spec, "devices", |device| each(device, "taints", |taint| default(taint, "timeAdded", now)));
    });
}
