// The JavaScript client: an informer sees what the typed client creates, patches and deletes. It fails at the first
// thing that is not as a program expects it, and uses only objects that need no controller.

import assert from 'node:assert/strict';
import * as k8s from '@kubernetes/client-node';

const LIMIT_MS = 60_000;

const config = new k8s.KubeConfig();
config.loadFromDefault();
const core = config.makeApiClient(k8s.CoreV1Api);
const labels = { app: 'javascript' };

const configMap = (name, value) => ({ metadata: { name, labels }, data: { value } });

async function rejects(code, call) {
    await assert.rejects(call, (error) => {
        assert.equal(error.code, code, `${error}`);
        return true;
    });
}

/// The events of an informer, one after the other.
async function follow(namespace) {
    const list = () => core.listNamespacedConfigMap({ namespace, labelSelector: 'app=javascript' });
    const informer = k8s.makeInformer(config, `/api/v1/namespaces/${namespace}/configmaps`, list, 'app=javascript');
    const seen = [];
    const waiting = [];
    const push = (kind) => (object) => {
        seen.push(`${kind} ${object.metadata.name} ${object.data.value}`);
        waiting.splice(0).forEach((wake) => wake());
    };
    informer.on('add', push('add'));
    informer.on('update', push('update'));
    informer.on('delete', push('delete'));
    informer.on('error', (error) => {
        throw error;
    });
    await informer.start();
    const next = async (expected) => {
        if (seen.length === 0) await new Promise((wake) => waiting.push(wake));
        assert.equal(seen.shift(), expected);
    };
    return next;
}

async function typed(namespace) {
    await core.createNamespacedConfigMap({ namespace, body: configMap('before', '0') });
    const next = await follow(namespace);
    await next('add before 0');
    const created = await core.createNamespacedConfigMap({ namespace, body: configMap('a', '1') });
    assert.ok(created.metadata.uid && created.metadata.creationTimestamp instanceof Date);
    await next('add a 1');
    await rejects(409, core.createNamespacedConfigMap({ namespace, body: configMap('a', '1') }));
    const merge = k8s.setHeaderOptions('Content-Type', k8s.PatchStrategy.MergePatch);
    const patched = await core.patchNamespacedConfigMap({ namespace, name: 'a', body: { data: { value: '2' } } }, merge);
    assert.equal(patched.data.value, '2');
    await next('update a 2');
    const operations = [{ op: 'replace', path: '/data/value', value: '3' }];
    const json = k8s.setHeaderOptions('Content-Type', k8s.PatchStrategy.JsonPatch);
    await core.patchNamespacedConfigMap({ namespace, name: 'a', body: operations }, json);
    await next('update a 3');
    const apply = k8s.setHeaderOptions('Content-Type', k8s.PatchStrategy.ServerSideApply);
    const body = { apiVersion: 'v1', kind: 'ConfigMap', metadata: { name: 'a', labels }, data: { value: '4' } };
    await core.patchNamespacedConfigMap(
        { namespace, name: 'a', body, fieldManager: 'javascript-test', force: true },
        apply,
    );
    await next('update a 4');
    await rejects(409, core.replaceNamespacedConfigMap({ namespace, name: 'a', body: created }));
    await core.deleteNamespacedConfigMap({ namespace, name: 'a' });
    await next('delete a 4');
    await rejects(404, core.readNamespacedConfigMap({ namespace, name: 'a' }));
    // The informer ends with the process: its stop() breaks the stream off with an error that nobody can catch.
}

async function anything(namespace) {
    const objects = k8s.KubernetesObjectApi.makeApiClient(config);
    const spec = {
        replicas: 0,
        selector: { matchLabels: labels },
        template: { metadata: { labels }, spec: { containers: [{ name: 'c', image: 'example.com/c:1' }] } },
    };
    const deployment = { apiVersion: 'apps/v1', kind: 'Deployment', metadata: { name: 'd', namespace }, spec };
    const created = await objects.create(deployment);
    assert.equal(created.spec.revisionHistoryLimit, 10);
    const read = await objects.read({ apiVersion: 'apps/v1', kind: 'Deployment', metadata: { name: 'd', namespace } });
    assert.equal(read.metadata.uid, created.metadata.uid);
    await objects.delete(deployment);
    const bad = { ...deployment, spec: { ...spec, selector: { matchLabels: { app: 'other' } } } };
    await rejects(422, objects.create(bad));
}

async function main() {
    const version = await config.makeApiClient(k8s.VersionApi).getCode();
    console.log('server', version.gitVersion);
    const made = await core.createNamespace({ body: { metadata: { generateName: 'javascript-' } } });
    const namespace = made.metadata.name;
    try {
        await typed(namespace);
        await anything(namespace);
    } finally {
        await core.deleteNamespace({ name: namespace });
    }
    console.log('done');
}

setTimeout(() => {
    console.error(`error: not done after ${LIMIT_MS} ms`);
    process.exit(1);
}, LIMIT_MS).unref();
await main();
process.exit(0);
