//go:build tools

// Package upstream pins the Kubernetes release that we compare with, so that its programs build from modules.
package upstream

import _ "k8s.io/kubernetes/cmd/kube-apiserver"
