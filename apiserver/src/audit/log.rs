//! Events as lines of a file, which begins anew when it grows too large: the old one gets the time into its name, and
//! goes away after some days or when there are too many. `-` is standard output.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::Value;

use super::{AuditError, Backend};
use crate::config::Config;
use crate::registry::object::ObjectExt;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// As upstream names old files.
const TIME: &str = "%Y-%m-%dT%H-%M-%S%.3f";

pub struct LogFile {
    out: Mutex<Out>,
    is_json: bool,
}

enum Out {
    Standard,
    File(Rotating),
}

impl LogFile {
    pub fn open(config: &Config) -> Result<Self, AuditError> {
        let is_json = match config.audit_log_format.as_str() {
            "json" => true,
            "legacy" => false,
            other => return Err(AuditError::Format(other.to_owned())),
        };
        let out = match config.audit_log_path.as_str() {
            "-" => Out::Standard,
            path => Out::File(Rotating::open(Path::new(path), Limits::of(config))?),
        };
        Ok(Self { out: Mutex::new(out), is_json })
    }
}

impl Backend for LogFile {
    fn keep(&self, event: &Value, line: &str) {
        let line = if self.is_json { format!("{line}\n") } else { legacy(event) };
        let written = match &mut *self.out.lock() {
            Out::Standard => std::io::stdout().write_all(line.as_bytes()),
            Out::File(file) => file.write(line.as_bytes(), Timestamp::now()),
        };
        if let Err(error) = written {
            tracing::error!(%error, id = event.str_at(&["auditID"]), "an audit event is lost: it cannot be written");
        }
    }
}

/// One line of words, as upstream wrote before it wrote JSON.
fn legacy(event: &Value) -> String {
    let or_none = |text: &str| if text.is_empty() { "<none>".to_owned() } else { text.to_owned() };
    let groups: Vec<String> = event.list_at(&["user", "groups"]).iter().map(Value::to_string).collect();
    let groups = if groups.is_empty() { "<none>".to_owned() } else { groups.join(",") };
    let code = event["responseStatus"]["code"].as_i64().map_or("<deferred>".to_owned(), |code| code.to_string());
    let impersonated = &event["impersonatedUser"];
    let as_groups: Vec<String> = impersonated.list_at(&["groups"]).iter().map(Value::to_string).collect();
    format!(
        "{} AUDIT: id={:?} stage={:?} ip={:?} method={:?} user={:?} groups={groups:?} as={:?} asgroups={:?} user-agent={:?} namespace={:?} uri={:?} response=\"{code}\"\n",
        event.str_at(&["stageTimestamp"]),
        event.str_at(&["auditID"]),
        event.str_at(&["stage"]),
        or_none(event["sourceIPs"][0].as_str().unwrap_or_default()),
        event.str_at(&["verb"]),
        or_none(event.str_at(&["user", "username"])),
        if impersonated.is_null() { "<self>" } else { impersonated.str_at(&["username"]) },
        if as_groups.is_empty() { "<lookup>".to_owned() } else { as_groups.join(",") },
        event.str_at(&["userAgent"]),
        or_none(event.str_at(&["objectRef", "namespace"])),
        event.str_at(&["requestURI"]),
    )
}

/// When a file is too large or too old; zero: never.
#[derive(Clone, Copy)]
struct Limits {
    bytes: u64,
    age: Duration,
    files: usize,
}

impl Limits {
    fn of(config: &Config) -> Self {
        // As upstream: 100 MB when nothing is said.
        let megabytes = if config.audit_log_maxsize == 0 { 100 } else { config.audit_log_maxsize };
        Self { bytes: megabytes << 20, age: DAY * config.audit_log_maxage, files: config.audit_log_maxbackup }
    }
}

struct Rotating {
    path: PathBuf,
    limits: Limits,
    file: File,
    size: u64,
}

impl Rotating {
    fn open(path: &Path, limits: Limits) -> std::io::Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let file = append(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), limits, file, size })
    }

    fn write(&mut self, line: &[u8], now: Timestamp) -> std::io::Result<()> {
        if self.size > 0 && self.size + line.len() as u64 > self.limits.bytes {
            self.begin_anew(now)?;
        }
        self.file.write_all(line)?;
        self.size += line.len() as u64;
        Ok(())
    }

    fn begin_anew(&mut self, now: Timestamp) -> std::io::Result<()> {
        std::fs::rename(&self.path, self.named(&now.strftime(TIME).to_string()))?;
        self.file = append(&self.path)?;
        self.size = 0;
        self.forget_old();
        Ok(())
    }

    /// `audit-TIME.log` for `audit.log`.
    fn named(&self, middle: &str) -> PathBuf {
        let stem = self.path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let extension = self.path.extension().map(|end| format!(".{}", end.to_string_lossy())).unwrap_or_default();
        self.path.with_file_name(format!("{stem}-{middle}{extension}"))
    }

    /// Old files, the newest first.
    fn old(&self) -> std::io::Result<Vec<PathBuf>> {
        let directory = self.path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let pattern = self.named("*").file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (start, end) = pattern.split_once('*').unwrap_or((&pattern, ""));
        let is_old = |name: &str| {
            let time = name.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
            time.is_some_and(|time| jiff::civil::DateTime::strptime(TIME, time).is_ok())
        };
        let mut old: Vec<PathBuf> = std::fs::read_dir(directory)?
            .filter_map(Result::ok)
            .filter(|entry| is_old(&entry.file_name().to_string_lossy()))
            .map(|entry| entry.path())
            .collect();
        old.sort_unstable_by(|a, b| b.cmp(a));
        Ok(old)
    }

    fn forget_old(&self) {
        let old = match self.old() {
            Ok(old) => old,
            Err(error) => return tracing::warn!(%error, "cannot look for old audit logs"),
        };
        let is_too_old = |path: &Path| {
            let written = std::fs::metadata(path).and_then(|metadata| metadata.modified());
            let age = written.ok().and_then(|written| SystemTime::now().duration_since(written).ok());
            !self.limits.age.is_zero() && age.is_some_and(|age| age > self.limits.age)
        };
        for (index, path) in old.iter().enumerate() {
            if (self.limits.files > 0 && index >= self.limits.files || is_too_old(path))
                && let Err(error) = std::fs::remove_file(path)
            {
                tracing::warn!(%error, path = %path.display(), "cannot delete an old audit log");
            }
        }
    }
}

fn append(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_begin_anew_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let mut file = Rotating::open(&path, Limits { bytes: 10, age: Duration::ZERO, files: 2 }).unwrap();
        for number in 0..5 {
            let now = Timestamp::from_second(1_700_000_000 + number).unwrap();
            file.write(format!("line {number}\n").as_bytes(), now).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "line 4\n");
        let old = file.old().unwrap();
        assert_eq!(old.len(), 2);
        assert_eq!(std::fs::read_to_string(&old[0]).unwrap(), "line 3\n");
        // What was there is kept.
        drop(file);
        let again = Rotating::open(&path, Limits { bytes: 100, age: Duration::ZERO, files: 2 }).unwrap();
        assert_eq!(again.size, 7);
    }
}
