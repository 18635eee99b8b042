//! From the template to the release.

use super::release::{Release, decide};
use super::*;
use apimachinery::controller::{Controller, Plan};
use jiff::Timestamp;
use serde_json::{Value, json};

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn pod(status: Value, node: &str) -> Value {
    json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "status": status,
        "spec": {"containers": [], "nodeName": node, "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "t"}]}})
}

/// A claim made for the pod.
fn claim(name: &str, status: Value) -> Value {
    let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u", "controller": true});
    json!({"metadata": {"name": name, "namespace": "ns", "uid": name, "annotations": {POD_CLAIM: "gpu"},
        "ownerReferences": [owner], "finalizers": [FINALIZER]}, "spec": {}, "status": status})
}

fn plan(pod: Value, claims: Vec<Value>, templates: &[&str]) -> Plan {
    let template = |name: &&str| {
        parse(
            json!({"metadata": {"name": name, "namespace": "ns"}, "spec": {"metadata": {"labels": {"l": "v"}}, "spec": {}}}),
        )
    };
    let controller = PodClaims {
        pods: Informer::fixed([parse(pod)]),
        claims: Informer::fixed(claims.into_iter().map(parse)),
        templates: Informer::fixed(templates.iter().map(template)),
    };
    controller.reconcile(&ObjectKey::new("ns", "p"), Timestamp::UNIX_EPOCH)
}

#[test]
fn a_claim_is_made_noted_and_reserved() {
    let made = plan(pod(json!({}), ""), vec![], &["t"]);
    let meta = &made.writes[0].body["metadata"];
    assert_eq!((&meta["generateName"], &meta["labels"]), (&json!("p-gpu-"), &json!({"l": "v"})));
    assert_eq!(meta["annotations"], json!({POD_CLAIM: "gpu"}));
    assert_eq!(meta["ownerReferences"][0]["uid"], "u");

    let noted = plan(pod(json!({}), ""), vec![claim("p-gpu-x", json!({}))], &["t"]);
    let statuses = json!([{"name": "gpu", "resourceClaimName": "p-gpu-x"}]);
    assert_eq!(noted.writes[0].body["status"]["resourceClaimStatuses"], statuses);

    let status = json!({"resourceClaimStatuses": statuses});
    assert!(plan(pod(status.clone(), ""), vec![claim("p-gpu-x", json!({}))], &["t"]).is_empty());
    let allocated = claim("p-gpu-x", json!({"allocation": {}}));
    let reserved = plan(pod(status.clone(), "n"), vec![allocated], &["t"]);
    let consumer = json!([{"resource": "pods", "name": "p", "uid": "u"}]);
    assert_eq!(reserved.writes[0].body["status"]["reservedFor"], consumer);
    let whole = claim("p-gpu-x", json!({"allocation": {}, "reservedFor": consumer}));
    assert!(plan(pod(status.clone(), "n"), vec![whole], &["t"]).is_empty());
    // A claim that somebody has deleted is made again.
    assert_eq!(plan(pod(status, ""), vec![], &["t"]).writes.len(), 1);
}

#[test]
fn a_missing_template_is_told() {
    let plan = plan(pod(json!({}), ""), vec![], &[]);
    let message =
        "PodResourceClaim gpu: resource claim template \"t\": resourceclaimtemplate.resource.k8s.io \"t\" not found";
    assert_eq!(
        (plan.events[0].reason.as_str(), plan.events[0].message.as_str()),
        ("FailedResourceClaimCreation", message)
    );
}

#[test]
fn names_keep_a_part_of_both() {
    let long = "x".repeat(80);
    let mut with_long_name = pod(json!({}), "");
    with_long_name["metadata"]["name"] = json!(long);
    let controller = PodClaims {
        pods: Informer::fixed([parse(with_long_name)]),
        claims: Informer::fixed([]),
        templates: Informer::fixed([parse(
            json!({"metadata": {"name": "t", "namespace": "ns"}, "spec": {"spec": {}}}),
        )]),
    };
    let plan = controller.reconcile(&ObjectKey::new("ns", &long), Timestamp::UNIX_EPOCH);
    assert_eq!(plan.writes[0].body["metadata"]["generateName"], format!("{}-gp", "x".repeat(53)));
}

#[test]
fn the_last_pod_takes_the_allocation_with_it() {
    let reserved = |uids: &[&str]| {
        let consumers: Vec<_> = uids.iter().map(|uid| json!({"resource": "pods", "name": uid, "uid": uid})).collect();
        json!({"allocation": {}, "reservedFor": consumers})
    };
    let release = |claim: Value, ended: &[&str], owner: Option<Value>| {
        let ended = ended.iter().map(|uid| (*uid).to_owned()).collect();
        decide(&parse(claim), &ended, owner.map(parse).as_ref())
    };
    assert_eq!(release(claim("c", reserved(&["u", "v"])), &[], None), Release::default());
    let one = release(claim("c", reserved(&["u", "v"])), &["u"], None);
    assert_eq!((one.remaining.map(|left| left.len()), one.deallocate, one.unprotect), (Some(1), false, false));
    let all = release(claim("c", reserved(&["u"])), &["u"], None);
    assert_eq!((all.remaining, all.deallocate, all.unprotect, all.delete), (Some(vec![]), true, true, false));
    // Allocated without being used: only its deletion frees it.
    assert_eq!(release(claim("c", json!({"allocation": {}})), &[], None), Release::default());
    let mut deleted = claim("c", json!({"allocation": {}}));
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert_eq!(release(deleted, &[], None), Release { deallocate: true, unprotect: true, ..Release::default() });
    let other = json!({"reservedFor": [{"apiGroup": "x", "resource": "things", "name": "a", "uid": "u"}]});
    assert_eq!(release(claim("c", other), &["u"], None), Release::default());
}

#[test]
fn a_generated_claim_goes_with_its_pods_end() {
    let deleted = |owner: Value| decide(&parse(claim("c", json!({}))), &HashSet::new(), Some(&parse(owner))).delete;
    assert!(!deleted(pod(json!({"phase": "Running"}), "n")));
    assert!(deleted(pod(json!({"phase": "Succeeded"}), "n")));
    let mut replaced = pod(json!({"phase": "Running"}), "n");
    replaced["metadata"]["uid"] = json!("another");
    assert!(deleted(replaced));
}

#[test]
fn of_pods_that_went_the_last_ones_are_remembered() {
    let mut gone = Gone::default();
    for uid in 0..=Gone::MOST {
        gone.add(&uid.to_string());
    }
    assert!(!gone.has("0") && gone.has("1") && gone.has(&Gone::MOST.to_string()));
}
