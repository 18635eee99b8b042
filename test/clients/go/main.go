// The Go client, on protobuf: a shared informer sees what the typed client creates, updates, patches, applies and
// deletes. It fails at the first thing that is not as a client-go program expects it.
//
// It never uses anything but client-go's public packages, and only objects that need no controller.
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/retry"
)

const (
	protobuf = "application/vnd.kubernetes.protobuf"
	limit    = 60 * time.Second
)

// spy counts the answers that are really protobuf.
type spy struct {
	next     http.RoundTripper
	protobuf *atomic.Int64
}

func (s spy) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := s.next.RoundTrip(r)
	if err == nil && strings.HasPrefix(answer.Header.Get("Content-Type"), protobuf) {
		s.protobuf.Add(1)
	}
	return answer, err
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
	fmt.Println("done")
}

func run() error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return err
	}
	answers := &atomic.Int64{}
	config.ContentType, config.AcceptContentTypes = protobuf, protobuf
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return spy{next, answers} })
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	version, err := client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("version: %w", err)
	}
	fmt.Println("server", version.GitVersion)

	made, err := client.CoreV1().Namespaces().Create(ctx,
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "client-go-"}}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create a namespace: %w", err)
	}
	defer client.CoreV1().Namespaces().Delete(context.Background(), made.Name, metav1.DeleteOptions{})
	if err := configMaps(ctx, client, made.Name); err != nil {
		return err
	}
	if err := pods(ctx, client, made.Name); err != nil {
		return err
	}
	if answers.Load() == 0 {
		return fmt.Errorf("no answer was protobuf")
	}
	return nil
}

type event struct {
	kind string
	data map[string]string
}

// configMaps checks that an informer sees each change once, in order, and that its lister agrees at the end.
func configMaps(ctx context.Context, client kubernetes.Interface, namespace string) error {
	api := client.CoreV1().ConfigMaps(namespace)
	before, err := api.Create(ctx, configMap("before", "0"), metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if before.UID == "" || before.ResourceVersion == "" || before.CreationTimestamp.IsZero() {
		return fmt.Errorf("the created object lacks what a server adds: %+v", before.ObjectMeta)
	}

	events := make(chan event, 64)
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = "app=client-go" }))
	informer := factory.Core().V1().ConfigMaps()
	send := func(kind string, object any) { events <- event{kind, object.(*corev1.ConfigMap).Data} }
	if _, err := informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { send("add", o) },
		UpdateFunc: func(_, o any) { send("update", o) },
		DeleteFunc: func(o any) { send("delete", o) },
	}); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.Informer().HasSynced) {
		return fmt.Errorf("the informer did not fill")
	}
	if err := expect(ctx, events, "add", "0"); err != nil {
		return err
	}

	if _, err := api.Create(ctx, configMap("a", "1"), metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if _, err := api.Create(ctx, configMap("a", "1"), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create again: %v, want AlreadyExists", err)
	}
	err = retry.RetryOnConflict(retry.DefaultRetry, func() error {
		object, err := api.Get(ctx, "a", metav1.GetOptions{})
		if err != nil {
			return err
		}
		object.Data["value"] = "2"
		_, err = api.Update(ctx, object, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("update: %w", err)
	}
	stale := configMap("a", "x")
	stale.ResourceVersion = before.ResourceVersion
	if _, err := api.Update(ctx, stale, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		return fmt.Errorf("update of an old version: %v, want Conflict", err)
	}
	for _, patch := range []struct {
		kind types.PatchType
		body string
	}{
		{types.MergePatchType, `{"data":{"value":"3"}}`},
		{types.StrategicMergePatchType, `{"data":{"more":"yes"}}`},
		{types.JSONPatchType, `[{"op":"remove","path":"/data/more"}]`},
	} {
		if _, err := api.Patch(ctx, "a", patch.kind, []byte(patch.body), metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("%s: %w", patch.kind, err)
		}
	}
	applied := applycorev1.ConfigMap("a", namespace).WithLabels(map[string]string{"app": "client-go"}).
		WithData(map[string]string{"applied": "yes"})
	object, err := api.Apply(ctx, applied, metav1.ApplyOptions{FieldManager: "client-go-test"})
	if err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	if object.Data["value"] != "3" || object.Data["applied"] != "yes" || len(object.ManagedFields) < 2 {
		return fmt.Errorf("after apply: %+v, managed by %d", object.Data, len(object.ManagedFields))
	}
	if err := api.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	if _, err := api.Get(ctx, "a", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return fmt.Errorf("get of a deleted object: %v, want NotFound", err)
	}

	if err := expect(ctx, events, "add", "1"); err != nil {
		return err
	}
	if err := expect(ctx, events, "update", "2"); err != nil {
		return err
	}
	for { // The patches may be folded into fewer updates; the deletion is the last.
		select {
		case e := <-events:
			if e.kind == "update" && e.data["value"] == "3" {
				continue
			}
			if e.kind != "delete" || e.data["applied"] != "yes" {
				return fmt.Errorf("event %+v, want the deletion of what was applied", e)
			}
		case <-ctx.Done():
			return fmt.Errorf("the deletion was not seen")
		}
		break
	}
	left, err := informer.Lister().ConfigMaps(namespace).List(labels.Everything())
	if err != nil || len(left) != 1 || left[0].Name != "before" {
		return fmt.Errorf("the lister has %d objects (%v)", len(left), err)
	}
	return pages(ctx, client, namespace)
}

// pages lists in pages, and deletes all at once.
func pages(ctx context.Context, client kubernetes.Interface, namespace string) error {
	api := client.CoreV1().ConfigMaps(namespace)
	for i := range 7 {
		if _, err := api.Create(ctx, configMap(fmt.Sprintf("page-%d", i), "p"), metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create: %w", err)
		}
	}
	options := metav1.ListOptions{Limit: 3, LabelSelector: "app=client-go"}
	total := 0
	for {
		list, err := api.List(ctx, options)
		if err != nil {
			return fmt.Errorf("page: %w", err)
		}
		total += len(list.Items)
		if options.Continue = list.Continue; list.Continue == "" {
			break
		}
	}
	if total != 8 {
		return fmt.Errorf("the pages have %d objects, want 8", total)
	}
	err := api.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "app=client-go"})
	if err != nil {
		return fmt.Errorf("delete all: %w", err)
	}
	list, err := api.List(ctx, metav1.ListOptions{LabelSelector: "app=client-go"})
	if err != nil || len(list.Items) != 0 {
		return fmt.Errorf("%d objects are left (%v)", len(list.Items), err)
	}
	return nil
}

// pods are what protobuf is used for most: quantities, ports, times and probes must come through, and a raw watch
// must say what becomes of a pod.
func pods(ctx context.Context, client kubernetes.Interface, namespace string) error {
	accounts := client.CoreV1().ServiceAccounts(namespace)
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}
	if _, err := accounts.Create(ctx, account, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create a service account: %w", err)
	}
	api := client.CoreV1().Pods(namespace)
	wanted := pod()
	created, err := api.Create(ctx, wanted, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create a pod: %w", err)
	}
	got, container := created.Spec.Containers[0].Resources.Requests.Cpu().String(), created.Spec.Containers[0]
	if got != "250m" || container.ReadinessProbe.HTTPGet.Port.StrVal != "http" || container.ImagePullPolicy == "" ||
		created.Status.QOSClass != corev1.PodQOSBurstable || created.Status.Phase != corev1.PodPending {
		return fmt.Errorf("the pod came back as %s %+v %+v", got, container, created.Status)
	}
	watch, err := api.Watch(ctx, metav1.ListOptions{ResourceVersion: created.ResourceVersion})
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	defer watch.Stop()
	created.Status.Message = "written by a test"
	if _, err := api.UpdateStatus(ctx, created, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("update the status: %w", err)
	}
	zero := int64(0)
	if err := api.Delete(ctx, created.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		return fmt.Errorf("delete the pod: %w", err)
	}
	seen := false
	for {
		select {
		case e, open := <-watch.ResultChan():
			if !open {
				return fmt.Errorf("the watch ended")
			}
			object, is := e.Object.(*corev1.Pod)
			if !is {
				return fmt.Errorf("event %s of %T: %+v", e.Type, e.Object, e.Object)
			}
			seen = seen || object.Status.Message == "written by a test"
			if e.Type == "DELETED" {
				if !seen || object.UID != created.UID {
					return fmt.Errorf("the pod's last state is %+v", object.Status)
				}
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("the pod's deletion was not seen")
		}
	}
}

func configMap(name, value string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "client-go"}},
		Data:       map[string]string{"value": value},
	}
}

// pod would never be scheduled: it asks for a scheduler that does not exist.
func pod() *corev1.Pod {
	object, err := runtime.Decode(scheme.Codecs.UniversalDeserializer(), []byte(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{
		"schedulerName":"none","containers":[{"name":"c","image":"example.com/c:1",
		"resources":{"requests":{"cpu":"0.25","memory":"64Mi"}},"ports":[{"name":"http","containerPort":80}],
		"readinessProbe":{"httpGet":{"port":"http","path":"/"}}}]}}`))
	if err != nil {
		panic(err)
	}
	return object.(*corev1.Pod)
}

func expect(ctx context.Context, events <-chan event, kind, value string) error {
	select {
	case e := <-events:
		if e.kind != kind || e.data["value"] != value {
			return fmt.Errorf("event %+v, want %s of %s", e, kind, value)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("no event, want %s of %s", kind, value)
	}
}
