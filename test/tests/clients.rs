//! Programs of other languages, and helm, against a live API server: each creates, watches, patches and deletes through
//! its own client library and checks what comes back. They need no controllers: a bare kube-apiserver will do, named by
//! KUBECONFIG. What they are made of comes from the languages' package registries and is kept in KETCH_CACHE.

use std::path::{Path, PathBuf};
use std::process::Command;

use apimachinery::process::{client_from_kubeconfig, install_crypto_provider};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use ketch_test::{run, setting};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::timeout;

const HELM: &str = "helm.sh/helm/v4/cmd/helm@v4.3.1";

/// Where this language's program is kept in the repository.
fn sources(language: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(language)
}

/// Where what it needs is kept between runs.
fn cache(language: &str) -> PathBuf {
    let root = std::env::var_os("KETCH_CACHE").map_or_else(|| PathBuf::from("/var/cache/ketch"), PathBuf::from);
    let dir = root.join("clients").join(language);
    std::fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("cannot create {}: {error}", dir.display()));
    dir
}

/// Fails with what to install when a tool is missing.
fn need(tool: &str, argument: &str, remedy: &str) {
    run(Command::new(tool).arg(argument)).unwrap_or_else(|error| panic!("{tool} is missing ({error}): {remedy}"));
}

fn must(what: &str, command: &mut Command) -> String {
    run(command).unwrap_or_else(|error| panic!("cannot {what}: {error}"))
}

/// The programs check everything themselves and say `done` at their end.
fn passes(command: &mut Command) {
    let output = must("talk to the server", command.env("KUBECONFIG", setting("KUBECONFIG")));
    assert_eq!(output.lines().last(), Some("done"), "{output}");
}

#[test]
#[ignore = "needs an API server (KUBECONFIG) and Go"]
fn the_go_client_works_on_protobuf() {
    need("go", "version", "install Go 1.26 or newer");
    let program = cache("go").join("client");
    must(
        "build the Go client",
        Command::new("go").current_dir(sources("go")).args(["build", "-o"]).arg(&program).arg("."),
    );
    passes(&mut Command::new(program));
}

#[test]
#[ignore = "needs an API server (KUBECONFIG) and Python"]
fn the_python_client_works() {
    need("python3", "--version", "install Python 3 with venv and pip");
    let (sources, environment) = (sources("python"), cache("python"));
    must("make a Python environment", Command::new("python3").args(["-m", "venv"]).arg(&environment));
    let python = environment.join("bin/python");
    let requirements = sources.join("requirements.txt");
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"];
    must("install the Python client", Command::new(&python).args(install).arg(requirements));
    passes(Command::new(python).arg(sources.join("client.py")));
}

#[test]
#[ignore = "needs an API server (KUBECONFIG) and Node.js"]
fn the_javascript_client_works() {
    need("node", "--version", "install Node.js 20 or newer");
    need("npm", "--version", "install npm");
    let (sources, dir) = (sources("javascript"), cache("javascript"));
    for file in ["package.json", "client.mjs"] {
        let copied = std::fs::copy(sources.join(file), dir.join(file));
        copied.unwrap_or_else(|error| panic!("cannot copy {file}: {error}"));
    }
    let install = ["install", "--no-audit", "--no-fund", "--silent"];
    must("install the JavaScript client", Command::new("npm").current_dir(&dir).args(install));
    passes(Command::new("node").current_dir(&dir).arg("client.mjs"));
}

#[test]
#[ignore = "needs an API server (KUBECONFIG) and Go"]
fn helm_installs_upgrades_rolls_back_and_uninstalls() {
    need("go", "version", "install Go 1.26 or newer");
    let dir = cache("helm");
    must("build helm", Command::new("go").env("GOBIN", &dir).args(["install", HELM]));
    let chart = sources("helm").join("chart");
    block_on(async |client| {
        let namespace = NamespaceOfTest::create(&client, "helm").await;
        let helm = |args: &[&str]| {
            let mut command = Command::new(dir.join("helm"));
            command.env("KUBECONFIG", setting("KUBECONFIG")).env("HELM_CACHE_HOME", dir.join("cache"));
            must(&format!("helm {}", args.join(" ")), command.args(["--namespace", &namespace.name]).args(args))
        };
        let chart = chart.to_str().expect("a printable path");
        let settings: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace.name);
        let colour =
            async || settings.get("small-settings").await.expect("the chart's object").data.unwrap_or_default();

        helm(&["install", "small", chart]);
        assert_eq!(colour().await["colour"], "blue");
        helm(&["upgrade", "small", chart, "--set", "colour=green"]);
        assert_eq!(colour().await["colour"], "green");
        assert!(helm(&["get", "values", "small"]).contains("green"));
        helm(&["rollback", "small", "1"]);
        assert_eq!(colour().await["colour"], "blue");
        let history = helm(&["history", "small"]);
        assert!(history.contains("superseded") && history.contains("Rollback to 1"), "{history}");
        helm(&["uninstall", "small"]);
        let gone = settings.get_opt("small-settings").await.expect("an answer");
        assert!(gone.is_none(), "uninstall left {gone:?}");
        namespace.delete().await;
    });
}

#[test]
#[ignore = "needs an API server (KUBECONFIG)"]
fn the_rust_client_works() {
    block_on(async |client| {
        let namespace = NamespaceOfTest::create(&client, "kube-rs").await;
        let api: Api<ConfigMap> = Api::namespaced(client, &namespace.name);
        let mut events = watcher(api.clone(), watcher::Config::default().labels("app=rust").streaming_lists()).boxed();
        while !matches!(next(&mut events).await, Event::InitDone) {}

        let create = PostParams { field_manager: Some("rust-test".into()), ..PostParams::default() };
        let created = api.create(&create, &config_map("1")).await.expect("create");
        expect(&mut events, "1").await;
        let error = api.create(&create, &config_map("1")).await.expect_err("it exists");
        assert!(matches!(&error, kube::Error::Api(status) if status.reason == "AlreadyExists"), "{error}");
        let merge = Patch::Merge(json!({"data": {"value": "2"}}));
        api.patch("a", &PatchParams::default(), &merge).await.expect("a merge patch");
        expect(&mut events, "2").await;
        let conflicting = Patch::Apply(config_map("3"));
        let apply = PatchParams::apply("another");
        let error = api.patch("a", &apply, &conflicting).await.expect_err("somebody else owns the value");
        assert!(matches!(&error, kube::Error::Api(status) if status.reason == "Conflict"), "{error}");
        let applied = api.patch("a", &apply.force(), &conflicting).await.expect("a forced apply");
        assert!(applied.metadata.managed_fields.is_some_and(|all| all.len() > 1), "nobody else manages the object");
        expect(&mut events, "3").await;
        let error = api.replace("a", &PostParams::default(), &created).await.expect_err("an old version");
        assert!(matches!(&error, kube::Error::Api(status) if status.code == 409), "{error}");

        let page = api.list(&ListParams::default().labels("app=rust").limit(1)).await.expect("a list");
        assert_eq!(page.items.len(), 1);
        api.delete("a", &DeleteParams::default()).await.expect("delete");
        let gone = next(&mut events).await;
        assert!(matches!(&gone, Event::Delete(object) if object.metadata.uid == created.metadata.uid), "{gone:?}");
        namespace.delete().await;
    });
}

fn config_map(value: &str) -> ConfigMap {
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "a", "labels": {"app": "rust"}},
        "data": {"value": value},
    });
    serde_json::from_value(object).expect("a config map")
}

type Events = futures::stream::BoxStream<'static, watcher::Result<Event<ConfigMap>>>;

async fn next(events: &mut Events) -> Event<ConfigMap> {
    let event = timeout(ketch_test::LIMIT, events.next()).await.expect("an event in time");
    event.expect("the watch goes on").expect("no error")
}

/// The next event must show the object with this value.
async fn expect(events: &mut Events, value: &str) {
    let event = next(events).await;
    let Event::Apply(object) = &event else { panic!("{event:?}, not a change to {value}") };
    assert_eq!(object.data.as_ref().and_then(|data| data.get("value")).map(String::as_str), Some(value));
}

fn block_on(test: impl AsyncFnOnce(Client)) {
    install_crypto_provider();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let kubeconfig = PathBuf::from(setting("KUBECONFIG"));
        let client = client_from_kubeconfig(&kubeconfig, "ketch-test").await.expect("a client");
        timeout(ketch_test::LIMIT * 3, test(client)).await.expect("done in time");
    });
}

/// A namespace of one test. A failed test leaves it behind.
struct NamespaceOfTest {
    api: Api<Namespace>,
    name: String,
}

impl NamespaceOfTest {
    async fn create(client: &Client, purpose: &str) -> Self {
        let api: Api<Namespace> = Api::all(client.clone());
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": format!("{purpose}-")}});
        let object = serde_json::from_value(object).expect("a namespace");
        let created = api.create(&PostParams::default(), &object).await.expect("create a namespace");
        Self { api, name: created.metadata.name.expect("a generated name") }
    }

    async fn delete(self) {
        self.api.delete(&self.name, &DeleteParams::default()).await.expect("delete the namespace");
    }
}
