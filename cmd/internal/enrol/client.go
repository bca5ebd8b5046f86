package enrol

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// NewClient returns the client of a pod in the cluster, with the rights of its
// service account: list and watch pods, namespaces and services, patch
// pods/status. userAgent is what the API server's audit log shows.
func NewClient(userAgent string) (kubernetes.Interface, error) {
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("enrol: Kubernetes client: %w", err)
	}
	cfg.QPS, cfg.Burst = 80, 160 // Istio's.
	cfg.UserAgent = userAgent
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("enrol: Kubernetes client: %w", err)
	}
	return client, nil
}
