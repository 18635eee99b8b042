//! Quality of service classes, and the resource figures of pods and containers in the units of the kernel.

use std::collections::BTreeMap;

use apimachinery::meta::Quantity;
use k8s_openapi::api::core::v1::{Container as Spec, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Class {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

type Amounts = BTreeMap<String, ApiQuantity>;

fn milli(amounts: &Option<Amounts>, name: &str) -> Option<i64> {
    let quantity = amounts.as_ref()?.get(name)?;
    quantity.0.parse::<Quantity>().ok().map(|quantity| quantity.milli_value())
}

fn amount(amounts: &Option<Amounts>, name: &str) -> Option<i64> {
    milli(amounts, name).map(|milli| milli.saturating_add(999) / 1000)
}

/// What the container asks for of a resource, in whole units.
pub fn request(spec: &Spec, name: &str) -> Option<i64> {
    amount(&spec.resources.as_ref()?.requests, name)
}

/// What the container may use at most of a resource, in whole units.
pub fn limit(spec: &Spec, name: &str) -> Option<i64> {
    amount(&spec.resources.as_ref()?.limits, name)
}

/// Requested and limiting amounts of one container or pod: CPU in thousandths, memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_request: Option<i64>,
    pub cpu_limit: Option<i64>,
    pub memory_request: Option<i64>,
    pub memory_limit: Option<i64>,
}

impl Resources {
    pub fn of(requirements: Option<&ResourceRequirements>) -> Self {
        let Some(r) = requirements else { return Self::default() };
        Self {
            cpu_request: milli(&r.requests, "cpu"),
            cpu_limit: milli(&r.limits, "cpu"),
            memory_request: amount(&r.requests, "memory"),
            memory_limit: amount(&r.limits, "memory"),
        }
    }

    fn is_empty(&self) -> bool {
        let zero = |amount: Option<i64>| amount.is_none_or(|amount| amount == 0);
        zero(self.cpu_request) && zero(self.cpu_limit) && zero(self.memory_request) && zero(self.memory_limit)
    }

    fn is_guaranteed(&self) -> bool {
        let same = |request: Option<i64>, limit: Option<i64>| {
            limit.is_some_and(|limit| limit > 0 && request.is_none_or(|request| request == limit))
        };
        same(self.cpu_request, self.cpu_limit) && same(self.memory_request, self.memory_limit)
    }

    /// The kernel's `cpu.shares`: 1024 for a whole CPU, at least 2. A limit without a request counts as one.
    pub fn cpu_shares(&self) -> u64 {
        let milli = self.cpu_request.or(self.cpu_limit).unwrap_or(0);
        u64::try_from(milli).unwrap_or(0).saturating_mul(1024).div_euclid(1000).clamp(2, 262_144)
    }

    /// Microseconds of CPU time in each period of `period_us`; `None` without a limit.
    pub fn cpu_quota(&self, period_us: i64) -> Option<i64> {
        let milli = self.cpu_limit.filter(|milli| *milli > 0)?;
        Some((milli.saturating_mul(period_us) / 1000).max(1000))
    }
}

fn all(pod: &Pod) -> impl Iterator<Item = &Spec> {
    pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers))
}

/// The class as the API server computed it, or else from the spec.
pub fn class(pod: &Pod) -> Class {
    let known = pod.status.as_ref().and_then(|status| status.qos_class.as_deref());
    match known {
        Some("Guaranteed") => return Class::Guaranteed,
        Some("Burstable") => return Class::Burstable,
        Some("BestEffort") => return Class::BestEffort,
        _ => {}
    }
    if let Some(whole) = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref()) {
        let whole = Resources::of(Some(whole));
        if !whole.is_empty() {
            return if whole.is_guaranteed() { Class::Guaranteed } else { Class::Burstable };
        }
    }
    let resources: Vec<Resources> = all(pod).map(|spec| Resources::of(spec.resources.as_ref())).collect();
    if resources.iter().all(Resources::is_empty) {
        Class::BestEffort
    } else if resources.iter().all(Resources::is_guaranteed) {
        Class::Guaranteed
    } else {
        Class::Burstable
    }
}

/// What the whole pod may use: sums over the containers that run together, or the largest init container.
pub fn pod_resources(pod: &Pod) -> Resources {
    let whole = Resources::of(pod.spec.as_ref().and_then(|spec| spec.resources.as_ref()));
    let spec = pod.spec.as_ref();
    let app: Vec<&Spec> = spec.iter().flat_map(|spec| &spec.containers).collect();
    let init: Vec<&Spec> = spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()).collect();
    let total = |get: fn(&Resources) -> Option<i64>, all_must_have: bool| -> Option<i64> {
        let value = |spec: &&Spec| get(&Resources::of(spec.resources.as_ref()));
        let (sidecars, once): (Vec<&Spec>, Vec<&Spec>) = init.iter().partition(|spec| super::plan::is_sidecar(spec));
        let together: Vec<Option<i64>> = app.iter().chain(&sidecars).map(value).collect();
        if all_must_have && together.iter().chain(&once.iter().map(value).collect::<Vec<_>>()).any(Option::is_none) {
            return None;
        }
        let sum = together.iter().flatten().sum::<i64>();
        let largest = once.iter().filter_map(value).max().unwrap_or(0);
        Some(sum.max(largest)).filter(|amount| *amount > 0)
    };
    Resources {
        cpu_request: whole.cpu_request.or_else(|| total(|r| r.cpu_request.or(r.cpu_limit), false)),
        cpu_limit: whole.cpu_limit.or_else(|| total(|r| r.cpu_limit, true)),
        memory_request: whole.memory_request.or_else(|| total(|r| r.memory_request.or(r.memory_limit), false)),
        memory_limit: whole.memory_limit.or_else(|| total(|r| r.memory_limit, true)),
    }
}

/// How ready the kernel is to kill the container when memory runs out; the same figures as upstream's.
pub fn oom_score_adj(pod: &Pod, spec: &Spec, node_memory: i64) -> i64 {
    if pod.spec.as_ref().and_then(|spec| spec.priority).is_some_and(|priority| priority >= 2_000_000_000) {
        return -997;
    }
    match class(pod) {
        Class::Guaranteed => -997,
        Class::BestEffort => 1000,
        Class::Burstable => {
            let request = Resources::of(spec.resources.as_ref()).memory_request.unwrap_or(0);
            let share = 1000 - 1000i128 * i128::from(request) / i128::from(node_memory.max(1));
            i64::try_from(share).unwrap_or(999).clamp(3, 999)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(containers: &str) -> Pod {
        let text = format!("spec: {{containers: {containers}}}");
        serde_json::from_value(serde_saphyr::from_str(&text).unwrap()).unwrap()
    }

    #[test]
    fn classes() {
        for (containers, want) in [
            ("[{name: a}]", Class::BestEffort),
            ("[{name: a, resources: {requests: {cpu: 100m}}}]", Class::Burstable),
            ("[{name: a, resources: {limits: {cpu: 1, memory: 1Gi}}}]", Class::Guaranteed),
            ("[{name: a, resources: {limits: {cpu: 1, memory: 1Gi}}}, {name: b}]", Class::Burstable),
            ("[{name: a, resources: {requests: {cpu: 500m}, limits: {cpu: 1, memory: 1Gi}}}]", Class::Burstable),
        ] {
            assert_eq!(class(&pod(containers)), want, "{containers}");
        }
    }

    #[test]
    fn kernel_units() {
        let pod = pod("[{name: a, resources: {requests: {cpu: 250m}, limits: {cpu: 500m, memory: 64Mi}}}, \
            {name: b, resources: {limits: {cpu: 1, memory: 64Mi}}}]");
        let resources = pod_resources(&pod);
        assert_eq!(resources.cpu_shares(), 1280);
        assert_eq!(resources.cpu_quota(100_000), Some(150_000));
        assert_eq!(resources.memory_limit, Some(128 << 20));
        assert_eq!(Resources::default().cpu_shares(), 2);
        assert_eq!(Resources::default().cpu_quota(100_000), None);
    }
}
