package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
)

// The name makes it the last case.
func TestZUninstall(t *testing.T) {
	ctx := claim(t, "uninstalled, pods and nodes show no trace of the mesh, and pods reach each other as before")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.apply("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {}}}", p.name)
	p.left("client", "server")
	text, err := chartText()
	if err != nil {
		t.Fatal(err)
	}
	if err := world.Delete(ctx, text); err != nil {
		t.Fatal(err)
	}
	p.until("the server without a mesh", works, "client", "get", "http://server/")
	for _, n := range world.Nodes {
		p.wait(n.Name+" without the plugin", func() error { return clean(n) })
	}
	p.run(pod{name: "later", node: "node1"})
	p.untouched("later")
}

// clean wants a node without anything that the agent put there.
func clean(n *cluster.Node) error {
	if _, err := os.Stat(filepath.Join(n.Root(), "opt/cni/bin/ztun-cni")); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the plugin's program: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(n.Root(), "etc/cni/net.d/*"))
	if err != nil {
		return err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "ztun") {
			return fmt.Errorf("%s names the plugin", file)
		}
	}
	return nil
}
