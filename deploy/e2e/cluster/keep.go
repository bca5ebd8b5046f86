package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// KeepLogs copies what the pods of the system namespaces said to the run's logs, and the list of all events.
func (c *Cluster) KeepLogs(ctx context.Context) error {
	events, err := c.CoreV1().Events("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("e2e: events: %w", err)
	}
	var lines []byte
	for _, e := range events.Items {
		lines = fmt.Appendf(lines, "%s %s %s/%s %s: %s\n", e.LastTimestamp.Format("15:04:05"), e.InvolvedObject.Kind, e.Namespace, e.InvolvedObject.Name, e.Reason, e.Message)
	}
	if err := os.WriteFile(filepath.Join(c.LogDir, "events.log"), lines, 0o644); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		dir := filepath.Join(n.Root(), "var/log/pods")
		found, err := filepath.Glob(filepath.Join(dir, "istio-system_*", "*", "*.log"))
		if err != nil {
			return err
		}
		for _, file := range found {
			content, err := os.ReadFile(file)
			if err != nil {
				continue // the pod may end meanwhile
			}
			pod := filepath.Base(filepath.Dir(filepath.Dir(file)))
			if err := os.WriteFile(filepath.Join(c.LogDir, fmt.Sprintf("%s-%s-%s", n.Name, pod, filepath.Base(file))), content, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
