//! The images that a cluster starts with, built here because no registry is assumed to be reachable: pause (holds a
//! pod's namespaces), demo (a shell and a web server for the tutorial) and cluster-dns.

pub mod conformance;
pub mod oci;
pub mod registry;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::plan::Plan;
use oci::{Entry, Image, Layer};

pub const PAUSE: &str = "ketch.local/pause:1";
pub const DEMO: &str = "ketch.local/demo:1";
pub const DNS: &str = "ketch.local/cluster-dns:1";

const PAUSE_SOURCE: &str = include_str!("pause.c");

/// The archives that each node of the cluster loads at its start.
pub fn archives(plan: &Plan) -> Vec<PathBuf> {
    let mut all = vec![base_archive(plan)];
    all.extend(plan.images.iter().cloned());
    all
}

fn base_archive(plan: &Plan) -> PathBuf {
    plan.data_dir.join("images").join("base.tar")
}

/// Builds the base archive.
pub fn build(plan: &Plan) -> Result<()> {
    let archive = base_archive(plan);
    let dir = archive.parent().context("the archive has no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let shell = shell_layer()?;
    let images = [
        Image {
            reference: PAUSE,
            layers: vec![pause_layer(dir)?],
            entrypoint: vec!["/pause"],
            command: vec![],
            user: "65535:65535",
        },
        Image {
            reference: DEMO,
            layers: vec![shell, demo_layer()],
            entrypoint: vec![],
            command: vec!["/bin/serve"],
            user: "",
        },
        Image {
            reference: DNS,
            layers: vec![program_layer(plan.bin("cluster-dns"))?],
            entrypoint: vec!["/cluster-dns"],
            command: vec![],
            user: "",
        },
    ];
    oci::write_archive(&archive, &images)
}

fn pause_layer(scratch: &Path) -> Result<Layer> {
    Ok(Layer::new(vec![Entry::file("pause", compile(scratch, "pause", PAUSE_SOURCE)?, 0o755)]))
}

/// Compiles a C program that needs nothing at run time.
fn compile(scratch: &Path, name: &str, code: &str) -> Result<Vec<u8>> {
    let source = scratch.join(format!("{name}.c"));
    let program = scratch.join(name);
    fs::write(&source, code).with_context(|| format!("cannot write {}", source.display()))?;
    let output = Command::new("cc")
        .args(["-Os", "-static", "-s", "-o"])
        .arg(&program)
        .arg(&source)
        .output()
        .context("cannot run cc (apt-get install gcc libc6-dev)")?;
    if !output.status.success() {
        bail!("cannot compile {name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    read(&program)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The shared libraries that a program needs, by their paths on this machine; none for a static one.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}

/// busybox with a link for each of its programs but those left out.
fn busybox_entries(busybox: &Path, without: &[&str]) -> Result<Vec<Entry>> {
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| format!("cannot run {} --list", busybox.display()))?;
    let mut entries = vec![Entry::file("bin/busybox", read(busybox)?, 0o755)];
    for applet in
        String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox" && !without.contains(name))
    {
        entries.push(Entry::link(&format!("bin/{applet}"), "busybox"));
    }
    Ok(entries)
}

/// A static busybox with a link for each of its programs.
fn shell_layer() -> Result<Layer> {
    let path = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(Path::new)
        .find(|path| path.exists())
        .context("busybox is missing (apt-get install busybox-static)")?;
    let mut entries = vec![
        Entry::dir("bin", 0o755),
        Entry::dir("etc", 0o755),
        Entry::dir("root", 0o700),
        Entry::dir("tmp", 0o1777),
        Entry::dir("var", 0o755),
        Entry::dir("usr", 0o755),
        Entry::file(
            "etc/passwd",
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n".to_vec(),
            0o644,
        ),
        Entry::file("etc/group", b"root:x:0:\nnogroup:x:65534:\n".to_vec(), 0o644),
    ];
    entries.extend(busybox_entries(path, &[])?);
    Ok(Layer::new(entries))
}

fn demo_layer() -> Layer {
    let serve = "#!/bin/sh\n# Answers every request with the pod's name, so that one sees which pod answered.\n\
                 mkdir -p /www\nhostname > /www/index.html\nexec httpd -f -p \"${PORT:-8080}\" -h /www\n";
    Layer::new(vec![Entry::dir("www", 0o755), Entry::file("bin/serve", serve.into(), 0o755)])
}

/// A program at the image's root with the shared libraries that it needs.
fn program_layer(program: &Path) -> Result<Layer> {
    let name = program.file_name().and_then(|n| n.to_str()).context("the program has no name")?;
    let mut entries =
        vec![Entry::dir("etc", 0o755), Entry::dir("tmp", 0o1777), Entry::file(name, read(program)?, 0o755)];
    for library in libraries(program)? {
        entries.push(Entry::file(&library[1..], read(Path::new(&library))?, 0o755));
    }
    Ok(Layer::new(entries))
}
