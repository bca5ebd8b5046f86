package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestReusedAddress(t *testing.T) {
	ctx := claim(t, "a pod's address goes to another identity: what is meant for the old pod never reaches the new one, nor does it pass for the old one")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node1"}, pod{name: "right", node: "node2"})
	p.enrolled("client", "server", "right")
	p.apply(policy, p.name, "allow-right", "ALLOW", `{from: [{source: {principals: ["cluster.local/ns/`+p.name+`/sa/right"]}}]}`)
	p.until("the policy", fails, "client", "get", "-timeout=2s", "http://server/")
	p.until("the right one to be let in", works, "right", "get", "http://server/")
	p.until("a way to the right one", works, "client", "get", "http://right/")

	address := p.get("right").Status.PodIP
	url := "http://" + net.JoinHostPort(address, "8080") + "/"
	service := p.begin("client", "load", "-for=12s", "-timeout=2s", "http://right/")
	kept := p.begin("client", "load", "-for=12s", "-timeout=2s", "-keep", "http://right/")
	direct := p.begin("client", "load", "-for=12s", "-timeout=2s", url)
	both := p.get("right").Status.PodIPs
	p.remove("right")
	next(t, world.Nodes[1], both)
	// Before anything else in the new pod can run, it asks the server that the old one may ask.
	p.run(pod{name: "wrong", node: "node2", spec: fmt.Sprintf(
		`initContainers: [{name: first, image: %q, imagePullPolicy: Never, args: [load, "-for=3s", "-timeout=2s", "http://server/"]}]`, cluster.AppImage)})
	if got := p.get("wrong").Status.PodIPs; !slices.Equal(got, both) {
		t.Fatalf("the new pod has %v, want the old one's addresses %v", got, both)
	}
	p.run(pod{name: "right", node: "node2"})
	p.until("the new pod under the old address", func(a answer) bool { return a.Seen.Host == "wrong" }, "client", "get", "-timeout=2s", url)

	var early loaded
	text, err := world.Logs(ctx, p.name, "wrong", "first")
	if err == nil {
		err = json.Unmarshal([]byte(strings.TrimPrefix(text, "open\n")), &early)
	}
	if err != nil {
		t.Fatalf("the new pod's first requests: %v: %s", err, text)
	}
	if early.Sent == 0 || early.OK != 0 {
		t.Errorf("with the old one's address %d of %d requests of the new pod were let in", early.OK, early.Sent)
	}
	p.logged(`direction="inbound"`, p.identity("wrong"), p.identity("server"), "error=")
	for name, s := range map[string]*session{"the service": service, "kept connections to the service": kept} {
		var l loaded
		s.end(&l)
		t.Logf("%s: %d of %d requests, answers of %v", name, l.OK, l.Sent, l.Hosts)
		if l.Hosts["right"] != l.OK {
			t.Errorf("%s of the right pod was answered by %v", name, l.Hosts)
		}
	}
	var l loaded
	direct.end(&l)
	t.Logf("its address: %d of %d requests, answers of %v", l.OK, l.Sent, l.Hosts)
	p.answeredAs("client", address, l.Hosts["wrong"])
}

// answeredAs wants each connection that a pod of the new identity answered to have been opened to that identity:
// the client's proxy logs at least so many.
func (p *place) answeredAs(client, address string, answers int) {
	p.t.Helper()
	p.wait("a log line for each answer", func() error {
		n, err := p.countLines(`direction="outbound"`, p.identity(client), address, p.identity("wrong"))
		if err == nil && n < answers {
			err = fmt.Errorf("%d answers of the new pod, %d connections to its identity", answers, n)
		}
		return err
	})
}

// remove deletes a pod and waits until it is gone, its address too; another may have its name by then.
func (p *place) remove(name string) {
	p.t.Helper()
	uid := p.get(name).UID
	if err := world.CoreV1().Pods(p.name).Delete(p.ctx, name, metav1.DeleteOptions{}); err != nil {
		p.t.Fatal(err)
	}
	p.wait(name+" to be gone", func() error {
		o, err := world.CoreV1().Pods(p.name).Get(p.ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) || err == nil && o.UID != uid {
			return nil
		}
		return errors.Join(errors.New("still there"), err)
	})
}

// next has a node's IPAM give these addresses, one of each family, to its next pod.
func next(t *testing.T, n *cluster.Node, addresses []corev1.PodIP) {
	t.Helper()
	dir := filepath.Join(n.Root(), "var/lib/cni/networks/pods")
	for i, a := range addresses {
		if _, err := os.Stat(filepath.Join(dir, a.IP)); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("%s is not free: %v", a.IP, err)
		}
		last := netip.MustParseAddr(a.IP).Prev().String()
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("last_reserved_ip.%d", i)), []byte(last), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
