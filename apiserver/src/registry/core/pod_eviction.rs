//! `pods/eviction`: a deletion that asks disruption budgets first.

use apimachinery::meta::{GroupResource, GroupVersionResource, LabelSelector};
use apimachinery::status::{Cause, Result, Status};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::pod::INTERNAL;
use super::pod_binding::set_condition;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Cx, DeleteOptions, Propagation, SubresourceHandler, unsupported_verb};
use crate::registry::tables::{condition, has_condition};

pub struct Eviction;

pub static EVICTION: Eviction = Eviction;

/// How many evictions a budget may have open at once.
const MAX_DISRUPTED: usize = 2000;
/// The type of the causes in refusals.
const CAUSE: &str = "DisruptionBudget";

fn pods() -> GroupVersionResource {
    GroupVersionResource::new("", "v1", "pods")
}

fn budgets() -> GroupVersionResource {
    GroupVersionResource::new("policy", "v1", "poddisruptionbudgets")
}

/// Pods that do not serve anybody any more, or not yet, are not protected.
fn is_unprotected(pod: &Value) -> bool {
    pod.is_being_deleted() || matches!(pod.str_at(&["status", "phase"]), "Succeeded" | "Failed" | "Pending")
}

/// What is to be done about a budget.
enum Verdict {
    /// Its disruptions are counted down, then the pod goes.
    Count,
    /// The pod is not ready, and going does no harm as long as it stays so.
    Unready,
}

fn verdict(pod: &Value, budget: &Value) -> Verdict {
    let count = |field: &str| budget.i64_at(&["status", field]).unwrap_or(0);
    let ready = has_condition(pod, "Ready");
    let enough = count("currentHealthy") >= count("desiredHealthy") && count("desiredHealthy") > 0;
    if !ready && (budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow" || enough) {
        Verdict::Unready
    } else {
        Verdict::Count
    }
}

/// The budget with one disruption less, or why there is none left.
fn decrement(mut budget: Value, pod: &str, now: &str) -> Result<Value> {
    let name = budget.name().to_owned();
    let count = |budget: &Value, field: &str| budget.i64_at(&["status", field]).unwrap_or(0);
    let resource = GroupResource::new("policy", "poddisruptionbudget");
    if count(&budget, "observedGeneration") < budget.i64_at(&["metadata", "generation"]).unwrap_or(0) {
        return Err(refuse_for_now(&name));
    }
    let allowed = count(&budget, "disruptionsAllowed");
    let forbidden = |why: &str, detail: &str| {
        let text = format!("The disruption budget {name} does not allow evicting pods currently: {detail}");
        with_cause(Status::forbidden(&resource, &name, why), text)
    };
    if allowed < 0 {
        let why = "pdb disruptions allowed is negative";
        return Err(forbidden(why, why));
    }
    if budget.map_at(&["status", "disruptedPods"]).is_some_and(|pods| pods.len() > MAX_DISRUPTED) {
        let why = "DisruptedPods map too big - too many evictions not confirmed by PDB controller";
        return Err(forbidden(why, "too many pending evictions not confirmed by PDB controller"));
    }
    if allowed == 0 {
        return Err(refuse(&budget));
    }
    budget.set(&["status", "disruptionsAllowed"], allowed - 1);
    if allowed == 1 {
        let observed = count(&budget, "observedGeneration");
        set_condition(
            &mut budget,
            json!({"type": "DisruptionAllowed", "status": "False", "reason": "InsufficientPods", "message": "",
                "observedGeneration": observed, "lastTransitionTime": now}),
        );
    }
    budget.set(&["status", "disruptedPods", pod], now);
    Ok(budget)
}

fn with_cause(mut status: Status, message: String) -> Status {
    let cause = Cause { reason: CAUSE.into(), message, ..Cause::default() };
    status.details.get_or_insert_default().causes.push(cause);
    status
}

const REFUSED: &str = "Cannot evict pod as it would violate the pod's disruption budget.";

fn refuse_for_now(budget: &str) -> Status {
    let text = format!("The disruption budget {budget} is still being processed by the server.");
    with_cause(Status::too_many_requests(REFUSED, 10), text)
}

fn refuse(budget: &Value) -> Status {
    let name = budget.name();
    let count = |field: &str| budget.i64_at(&["status", field]).unwrap_or(0);
    let (healthy, desired) = (count("currentHealthy"), count("desiredHealthy"));
    let blocking =
        condition(budget, "DisruptionAllowed").filter(|c| c["status"] == "False" && !c.str_at(&["message"]).is_empty());
    let text = match blocking {
        Some(c) if c["reason"] == "SyncFailed" => {
            let message = c.str_at(&["message"]);
            format!(
                "The disruption budget {name} does not allow evicting pods currently because it failed sync: {message}"
            )
        }
        _ if healthy <= desired => {
            format!("The disruption budget {name} needs {desired} healthy pods and has {healthy} currently")
        }
        Some(c) => {
            let (reason, message) = (c.str_at(&["reason"]), c.str_at(&["message"]));
            format!("The disruption budget {name} does not allow evicting pods currently ({reason}): {message}")
        }
        None => format!("The disruption budget {name} does not allow evicting pods currently"),
    };
    with_cause(Status::too_many_requests(REFUSED, 0), text)
}

/// The options in the body of the eviction.
fn delete_options(body: &Value, dry_run: bool) -> DeleteOptions {
    let given = &body["deleteOptions"];
    let text = |path: &[&str]| given.at(path).and_then(Value::as_str).map(str::to_owned);
    DeleteOptions {
        grace_period: given["gracePeriodSeconds"].as_i64(),
        propagation: match given.str_at(&["propagationPolicy"]) {
            "Foreground" => Some(Propagation::Foreground),
            "Background" => Some(Propagation::Background),
            "Orphan" => Some(Propagation::Orphan),
            _ => None,
        },
        uid: text(&["preconditions", "uid"]),
        resource_version: text(&["preconditions", "resourceVersion"]),
        dry_run: dry_run || !given.list_at(&["dryRun"]).is_empty(),
        ..DeleteOptions::default()
    }
}

impl Eviction {
    async fn evict(&self, cx: &Cx<'_>, name: &str, mut options: DeleteOptions) -> Result<()> {
        let pod = cx.server.get(&pods(), cx.namespace, name).await?;
        let asked_version = options.resource_version.clone();
        if is_unprotected(&pod) {
            return self.mark_and_delete(cx, name, options).await;
        }
        let matching = matching_budgets(cx, &pod)?;
        let budget_name = match matching.as_slice() {
            [] => return self.mark_and_delete(cx, name, options).await,
            [budget] => budget.name().to_owned(),
            _ => {
                let text =
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
                return Err(Status::failure(500, "", text));
            }
        };
        match verdict(&pod, &matching[0]) {
            Verdict::Unready => options.resource_version = Some(pod.resource_version().to_owned()),
            Verdict::Count => count_down(cx, &budget_name, name, options.dry_run).await?,
        }
        match self.mark_and_delete(cx, name, options).await {
            // The pod may have become ready meanwhile: the client asks again.
            Err(status) if status.code == 409 && asked_version.is_none() => Err(refuse_for_now(&budget_name)),
            result => result,
        }
    }

    /// The pod says why it goes, then it goes.
    async fn mark_and_delete(&self, cx: &Cx<'_>, name: &str, mut options: DeleteOptions) -> Result<()> {
        if !options.dry_run {
            let now = cx.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let wanted = (options.uid.clone(), options.resource_version.clone());
            let mark = |mut pod: Value| {
                let mismatch = |field: &str, wanted: &str, actual: &str| {
                    let why = format!(
                        "the {field} in the precondition ({wanted}) does not match the {field} in record ({actual}). The object might have been modified"
                    );
                    Status::conflict(&GroupResource::new("", "Pod"), name, why)
                };
                if let Some(uid) = wanted.0.as_deref().filter(|uid| !uid.is_empty() && *uid != pod.uid()) {
                    return Err(mismatch("UID", uid, pod.uid()));
                }
                if let Some(version) = wanted.1.as_deref().filter(|v| !v.is_empty() && *v != pod.resource_version()) {
                    return Err(mismatch("ResourceVersion", version, pod.resource_version()));
                }
                let condition = json!({"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                    "message": "Eviction API: evicting", "lastTransitionTime": now});
                set_condition(&mut pod, condition);
                Ok(pod)
            };
            let marked = cx.server.guaranteed_update(cx.user, &pods(), cx.namespace, name, INTERNAL, mark).await?;
            if options.resource_version.is_some() {
                options.resource_version = Some(marked.resource_version().to_owned());
            }
        }
        cx.server.delete_with(cx.user, &pods(), cx.namespace, name, &options).await?;
        Ok(())
    }
}

/// Budgets of the namespace that select the pod. One with a broken selector protects nothing.
fn matching_budgets(cx: &Cx<'_>, pod: &Value) -> Result<Vec<Value>> {
    let cache = cx
        .server
        .caches
        .get("policy", "poddisruptionbudgets")
        .ok_or_else(|| Status::service_unavailable("disruption budgets are not served"))?;
    let labels = &pod["metadata"]["labels"];
    let selects =
        |budget: &Value| LabelSelector::from_json(&budget["spec"]["selector"]).is_ok_and(|s| s.matches_value(labels));
    Ok(cache.list(Some(cx.namespace)).iter().map(|stored| stored.value()).filter(selects).collect())
}

async fn count_down(cx: &Cx<'_>, budget: &str, pod: &str, dry_run: bool) -> Result<()> {
    let now = cx.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    if dry_run {
        let current = cx.server.get(&budgets(), cx.namespace, budget).await?;
        return decrement(current, pod, &now).map(|_| ());
    }
    let change = |current: Value| decrement(current, pod, &now);
    cx.server.guaranteed_update(cx.user, &budgets(), cx.namespace, budget, "status", change).await?;
    Ok(())
}

#[async_trait]
impl SubresourceHandler for Eviction {
    async fn handle(&self, cx: &Cx<'_>, name: &str, verb: &str, body: Value) -> Result<Value> {
        if verb != "create" {
            return Err(unsupported_verb(&GroupResource::new("", "pods/eviction"), verb));
        }
        if !body.name().is_empty() && body.name() != name {
            return Err(Status::bad_request("name in URL does not match name in Eviction object"));
        }
        self.evict(cx, name, delete_options(&body, cx.dry_run)).await?;
        Ok(json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(allowed: i64, healthy: i64, desired: i64) -> Value {
        json!({"metadata": {"name": "b", "generation": 1}, "status": {"observedGeneration": 1,
            "disruptionsAllowed": allowed, "currentHealthy": healthy, "desiredHealthy": desired}})
    }

    #[test]
    fn disruptions_are_counted_down() {
        let changed = decrement(budget(1, 3, 2), "p", "2026-01-01T00:00:00Z").unwrap();
        assert_eq!(changed["status"]["disruptionsAllowed"], 0);
        assert_eq!(changed["status"]["disruptedPods"], json!({"p": "2026-01-01T00:00:00Z"}));
        assert_eq!(changed["status"]["conditions"][0]["reason"], "InsufficientPods");
    }

    #[test]
    fn refusals_say_why() {
        let refused = decrement(budget(0, 2, 2), "p", "").unwrap_err();
        assert_eq!((refused.code, refused.reason.as_str()), (429, "TooManyRequests"));
        let causes = refused.details.unwrap().causes;
        assert_eq!(causes[0].message, "The disruption budget b needs 2 healthy pods and has 2 currently");
        let mut unseen = budget(1, 3, 2);
        unseen["metadata"]["generation"] = 2.into();
        assert_eq!(decrement(unseen, "p", "").unwrap_err().details.unwrap().retry_after_seconds, 10);
    }

    #[test]
    fn pods_that_are_not_ready_may_go_when_enough_others_are() {
        let pod = json!({"status": {"phase": "Running"}});
        assert!(matches!(verdict(&pod, &budget(0, 2, 2)), Verdict::Unready));
        assert!(matches!(verdict(&pod, &budget(0, 1, 2)), Verdict::Count));
    }
}
