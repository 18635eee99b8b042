//! systemd-logind over the system's D-Bus.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use zbus::{Connection, DynamicType, Message, MessageStream, OwnedVariant};

use super::{Connect, Logind, LogindError};

const SERVICE: &str = "org.freedesktop.login1";
const OBJECT: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const ANNOUNCEMENTS: &str = "type='signal',sender='org.freedesktop.login1',path='/org/freedesktop/login1',\
    interface='org.freedesktop.login1.Manager',member='PrepareForShutdown'";
/// Where logind's configuration is completed, and the name that upstream's kubelet uses there.
const SETTINGS: &str = "/etc/systemd/logind.conf.d";
const SETTINGS_FILE: &str = "99-kubelet.conf";
/// How often, and how far apart, logind is asked whether it has read its configuration again.
const CHECKS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A bus that does not answer is as good as none.
const WITHIN: Duration = Duration::from_secs(25);

fn failed<E: std::error::Error + 'static>(step: &'static str) -> impl FnOnce(E) -> LogindError {
    move |error| LogindError { step, why: apimachinery::process::error_chain(&error) }
}

/// The bus at its usual place.
pub struct SystemBus;

#[async_trait::async_trait]
impl Connect for SystemBus {
    async fn connect(&self) -> Result<Arc<dyn Logind>, LogindError> {
        let step = "connect to the system's message bus";
        match tokio::time::timeout(WITHIN, Connection::system()).await {
            Ok(connected) => Ok(Arc::new(SystemLogind { bus: connected.map_err(failed(step))? })),
            Err(_) => Err(LogindError { step, why: "no answer".to_owned() }),
        }
    }
}

struct SystemLogind {
    bus: Connection,
}

impl SystemLogind {
    async fn call<B: serde::Serialize + DynamicType + Sync>(
        &self,
        step: &'static str,
        (service, object): (&'static str, &'static str),
        (interface, method): (&'static str, &'static str),
        arguments: &B,
    ) -> Result<Message, LogindError> {
        let call = self.bus.call_method(Some(service), object, Some(interface), method, arguments);
        match tokio::time::timeout(WITHIN, call).await {
            Ok(answer) => answer.map_err(failed(step)),
            Err(_) => Err(LogindError { step, why: "no answer".to_owned() }),
        }
    }
}

#[async_trait::async_trait]
impl Logind for SystemLogind {
    async fn longest_delay(&self) -> Result<Duration, LogindError> {
        let step = "read InhibitDelayMaxUSec of logind";
        let property = (MANAGER, "InhibitDelayMaxUSec");
        let get = ("org.freedesktop.DBus.Properties", "Get");
        let answer = self.call(step, (SERVICE, OBJECT), get, &property).await?;
        let value: OwnedVariant = answer.body().deserialize().map_err(failed(step))?;
        u64::try_from(value).map(Duration::from_micros).map_err(failed(step))
    }

    async fn allow_delay(&self, delay: Duration) -> Result<(), LogindError> {
        write_settings(Path::new(SETTINGS), delay)?;
        let systemd = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1");
        let kill = ("org.freedesktop.systemd1.Manager", "KillUnit");
        let hang_up = ("systemd-logind.service", "all", 1i32);
        self.call("have logind read its configuration again", systemd, kill, &hang_up).await?;
        let mut pause = FIRST_PAUSE;
        for _ in 0..CHECKS {
            if self.longest_delay().await? >= delay {
                return Ok(());
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        let why = format!("it does not allow {} s, although {SETTINGS}/{SETTINGS_FILE} says so", delay.as_secs());
        Err(LogindError { step: "have logind wait long enough", why })
    }

    async fn delay_shutdown(&self) -> Result<OwnedFd, LogindError> {
        let step = "get a lock that delays shutdowns";
        let lock = ("shutdown", "kubelet", "Kubelet needs time to handle node shutdown", "delay");
        let answer = self.call(step, (SERVICE, OBJECT), (MANAGER, "Inhibit"), &lock).await?;
        let lock: zbus::OwnedFd = answer.body().deserialize().map_err(failed(step))?;
        Ok(lock.into())
    }

    async fn announcements(&self) -> Result<BoxStream<'static, bool>, LogindError> {
        let listening = MessageStream::for_match_rule(ANNOUNCEMENTS, &self.bus, None).await;
        let signals = listening.map_err(failed("listen for shutdowns"))?;
        let is_going = |signal: zbus::Result<Message>| async move {
            match signal.and_then(|signal| signal.body().deserialize::<bool>()) {
                Ok(is_going) => Some(is_going),
                Err(error) => {
                    tracing::warn!(%error, "an announcement of a shutdown cannot be read");
                    None
                }
            }
        };
        Ok(signals.filter_map(is_going).boxed())
    }
}

fn write_settings(directory: &Path, delay: Duration) -> Result<(), LogindError> {
    let text = format!("# Written by the kubelet.\n[Login]\nInhibitDelayMaxSec={}\n", delay.as_secs());
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(directory.join(SETTINGS_FILE), text));
    written.map_err(failed("write logind's configuration"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_written_for_logind() {
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("logind.conf.d");
        write_settings(&settings, Duration::from_secs(90)).unwrap();
        let text = fs::read_to_string(settings.join("99-kubelet.conf")).unwrap();
        assert!(text.ends_with("[Login]\nInhibitDelayMaxSec=90\n"), "{text}");
    }
}
