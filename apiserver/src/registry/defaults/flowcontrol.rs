//! Defaults of flow schemas and priority levels.

use serde_json::Value;

use super::{default, default_zero, existing, within};

pub fn flow_schema(obj: &mut Value) {
    within(obj, "spec", |spec| default_zero(spec, "matchingPrecedence", 1000));
}

pub fn priority_level(obj: &mut Value) {
    existing(obj, "spec", |spec| {
        existing(spec, "exempt", |exempt| {
            default(exempt, "nominalConcurrencyShares", 0);
            default(exempt, "lendablePercent", 0);
        });
        existing(spec, "limited", |limited| {
            default(limited, "nominalConcurrencyShares", 30);
            default(limited, "lendablePercent", 0);
            existing(limited, "limitResponse", |response| {
                existing(response, "queuing", |queuing| {
                    default_zero(queuing, "handSize", 8);
                    default_zero(queuing, "queues", 64);
                    default_zero(queuing, "queueLengthLimit", 50);
                });
            });
        });
    });
}

/// Priority classes of pods.
pub fn priority_class(obj: &mut Value) {
    default(obj, "preemptionPolicy", "PreemptLowerPriority");
}
