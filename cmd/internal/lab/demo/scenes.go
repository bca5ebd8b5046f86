package demo

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/ztun/ztun/cmd/internal/lab"
	"github.com/ztun/ztun/cmd/internal/lab/wire"
)

// canary is a text that no cipher text will hold by chance.
const canary = "the-canary-sings-in-clear-text"

// patience bounds how long something that comes by itself is waited for.
const patience = 15 * time.Second

// scenes plays all scenes. An error means that one could not be played.
func (d *demo) scenes(ctx context.Context) error {
	tap, err := d.tap(ctx)
	if err != nil {
		return err
	}
	defer tap.close()
	status, err := d.lab.Status(ctx)
	if err != nil {
		return err
	}
	at := map[string]netip.Addr{}
	for _, p := range status.Pods {
		at[p.Name] = p.Addresses[0]
	}
	for _, scene := range []func(context.Context, *tapClient, map[string]netip.Addr) error{
		d.sceneTap, d.sceneAllowed, d.sceneDenied, d.scenePrivileges, d.sceneFailClosed, d.sceneRestart,
	} {
		if err := scene(ctx, tap, at); err != nil {
			return err
		}
	}
	return nil
}

func httpAt(a netip.Addr) string { return "http://" + netip.AddrPortFrom(a, 8080).String() }

// sceneTap makes sure that the tap would notice.
func (d *demo) sceneTap(ctx context.Context, tap *tapClient, at map[string]netip.Addr) error {
	d.step("a tap on the wire between the nodes; first, two pods outside of the mesh")
	if _, err := tap.reset(); err != nil {
		return err
	}
	var a answer
	err := d.eventually(ctx, func() (bool, error) {
		var err error
		a, err = d.call(ctx, "plain/outsider", httpAt(at["bystander"]), "--data", canary)
		return a.code == 0, err
	})
	if err != nil {
		return err
	}
	seen, err := tap.reset()
	if err != nil {
		return err
	}
	d.check(a.field("server") == "bystander", "plain/outsider on node-a talks to plain/bystander on node-b", a)
	d.check(seen.Words[canary] > 0 && seen.Clear > 0, "the tap reads their words", describe(seen))
	return nil
}

// sceneAllowed is the mesh at work.
func (d *demo) sceneAllowed(ctx context.Context, tap *tapClient, at map[string]netip.Addr) error {
	d.step("demo/client on node-a calls http://server, a service on node-b, by name")
	a, err := d.call(ctx, "demo/client", "http://server", "--data", canary)
	if err != nil {
		return err
	}
	seen, err := tap.reset()
	if err != nil {
		return err
	}
	d.check(a.code == 0 && a.field("server") == "server" && strings.Contains(a.out, canary), "it gets the server's answer", a)
	client, _ := netip.ParseAddrPort(a.field("client"))
	d.check(client.Addr() == at["client"], fmt.Sprintf("the server saw the client's own address, %s", at["client"]), "client:", a.field("client"))
	d.check(seen.Handshakes > 0 && seen.Records > 0, "between the nodes there was TLS on port 15008", describe(seen))
	d.check(seen.Clear == 0 && seen.Words[canary] == 0, "and nothing else: not a segment in clear, not a word of the payload", describe(seen))
	return d.checkIdentities(ctx)
}

// checkIdentities looks for both ends' identities in both access logs.
func (d *demo) checkIdentities(ctx context.Context) error {
	const source, destination = "spiffe://cluster.local/ns/demo/sa/client", "spiffe://cluster.local/ns/demo/sa/server"
	for _, end := range []struct{ process, direction string }{{"proxy/node-a", "outbound"}, {"proxy/node-b", "inbound"}} {
		var line, text string
		err := d.eventually(ctx, func() (bool, error) {
			var err error
			if text, err = d.logs(ctx, end.process); err != nil {
				return false, err
			}
			line = accessLine(text, end.direction, source, destination)
			return line != "", nil
		})
		if err != nil {
			return err
		}
		d.check(line != "", fmt.Sprintf("the access log of %s has both identities (%s)", end.process, end.direction), lastLines(text, 3))
		if line != "" {
			fmt.Fprintf(d.out, "        %s\n", strings.ReplaceAll(line, "\t", " "))
		}
	}
	return nil
}

// accessLine returns the line of an access log that tells of a connection in
// that direction between two identities, which ended without an error.
func accessLine(log, direction, source, destination string) string {
	for line := range strings.Lines(log) {
		has := !strings.Contains(line, " error=")
		for _, part := range []string{"connection complete", "direction=\"" + direction, "src.identity=\"" + source + "\"", "dst.identity=\"" + destination + "\""} {
			has = has && strings.Contains(line, part)
		}
		if has {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// sceneDenied is the policy at work.
func (d *demo) sceneDenied(ctx context.Context, tap *tapClient, at map[string]netip.Addr) error {
	d.step("demo/intruder calls the same service, which its policy does not name; so does plain/outsider")
	a, err := d.call(ctx, "demo/intruder", "http://server", "--data", canary)
	if err != nil {
		return err
	}
	d.check(a.code == int(syscall.ECONNREFUSED), "demo/intruder is refused: ECONNREFUSED", a)
	a, err = d.call(ctx, "plain/outsider", httpAt(at["server"]))
	if err != nil {
		return err
	}
	d.check(a.code != 0 && a.field("server") == "", "plain/outsider is refused too: it has no identity", a)
	text, err := d.logs(ctx, "demo/server")
	if err != nil {
		return err
	}
	heard := strings.Contains(text, at["intruder"].String()+":") || strings.Contains(text, at["outsider"].String()+":")
	d.check(!heard, "the server has heard of neither", lastLines(text, 3))
	_, err = tap.reset()
	return err
}

// scenePrivileges looks at the proxies from the outside.
func (d *demo) scenePrivileges(ctx context.Context, _ *tapClient, _ map[string]netip.Addr) error {
	status, err := d.lab.Status(ctx)
	if err != nil {
		return err
	}
	for _, n := range status.Nodes {
		d.check(strings.Trim(n.CapEff, "0") == "" && n.CapEff != "", fmt.Sprintf("proxy/%s (pid %d in the lab) holds no capability: CapEff %s", n.Name, n.Proxy.PID, n.CapEff), n.CapEff)
	}
	return nil
}

// sceneFailClosed kills everything of the mesh on a node.
func (d *demo) sceneFailClosed(ctx context.Context, tap *tapClient, at map[string]netip.Addr) error {
	before, err := d.call(ctx, "plain/bystander", httpAt(at["client"]))
	if err != nil {
		return err
	}
	d.step("kill -9 of node-a's proxy and attach side, both")
	for _, process := range []string{"proxy/node-a", "attach/node-a"} {
		if err := d.lab.Kill(ctx, process, syscall.SIGKILL, true); err != nil {
			return err
		}
	}
	if err := d.awaitProcesses(ctx, "node-a", "stopped"); err != nil {
		return err
	}
	if _, err := tap.reset(); err != nil {
		return err
	}
	calls := []struct {
		pod, url string
		a        answer
	}{
		{pod: "demo/client", url: "http://server"},
		{pod: "demo/client", url: httpAt(at["bystander"])},
		{pod: "plain/bystander", url: httpAt(at["client"])},
	}
	errs := make(chan error, len(calls))
	for i := range calls {
		go func() {
			var err error
			calls[i].a, err = d.call(ctx, calls[i].pod, calls[i].url, "--data", canary)
			errs <- err
		}()
	}
	for range calls {
		if err := <-errs; err != nil {
			return err
		}
	}
	d.check(calls[0].a.code != 0, "demo/client reaches no service", calls[0].a)
	d.check(calls[1].a.code != 0, "demo/client reaches nobody in plain text either", calls[1].a)
	d.check(before.field("server") == "client" && calls[2].a.code != 0, "and nobody reaches demo/client, which plain/bystander did a moment ago", before, calls[2].a)
	seen, err := tap.reset()
	if err != nil {
		return err
	}
	d.check(seen.Clear == 0 && seen.Words[canary] == 0, "not a word was on the wire", describe(seen))
	return nil
}

// sceneRestart brings the node back, then kills a proxy that the lab restarts.
func (d *demo) sceneRestart(ctx context.Context, _ *tapClient, _ map[string]netip.Addr) error {
	d.step("node-a's proxy and attach side start again")
	for _, process := range []string{"attach/node-a", "proxy/node-a"} {
		if err := d.lab.Release(ctx, process); err != nil {
			return err
		}
	}
	if err := d.checkServed(ctx, "demo/client is served again, by a new proxy"); err != nil {
		return err
	}
	d.step("kill -9 of the proxy on the server's side")
	if err := d.lab.Kill(ctx, "proxy/node-b", syscall.SIGKILL, false); err != nil {
		return err
	}
	if err := d.awaitRestart(ctx, "node-b"); err != nil {
		return err
	}
	return d.checkServed(ctx, "the server is served again, by a new proxy")
}

func (d *demo) checkServed(ctx context.Context, claim string) error {
	began := time.Now()
	var a answer
	err := d.eventually(ctx, func() (bool, error) {
		var err error
		a, err = d.call(ctx, "demo/client", "http://server")
		return a.field("server") == "server", err
	})
	if err != nil {
		return err
	}
	d.check(a.field("server") == "server", fmt.Sprintf("%s, after %.1f s", claim, time.Since(began).Seconds()), a)
	return nil
}

// awaitProcesses waits until a node's two processes are in a state.
func (d *demo) awaitProcesses(ctx context.Context, node, state string) error {
	return d.awaitNode(ctx, node, func(n lab.NodeStatus) bool { return n.Proxy.State == state && n.Attach.State == state })
}

// awaitRestart waits until a node's proxy runs for the second time.
func (d *demo) awaitRestart(ctx context.Context, node string) error {
	return d.awaitNode(ctx, node, func(n lab.NodeStatus) bool { return n.Proxy.Starts > 1 && n.Proxy.State == "running" })
}

func (d *demo) awaitNode(ctx context.Context, node string, is func(lab.NodeStatus) bool) error {
	var last lab.NodeStatus
	reached := false
	err := d.eventually(ctx, func() (bool, error) {
		status, err := d.lab.Status(ctx)
		if err != nil {
			return false, err
		}
		for _, n := range status.Nodes {
			if n.Name == node {
				last = n
				reached = is(n)
			}
		}
		return reached, nil
	})
	if err == nil && !reached {
		err = fmt.Errorf("demo: %s: processes are %s and %s", node, last.Proxy.State, last.Attach.State)
	}
	return err
}

// eventually calls f until it holds, patience runs out or it fails.
func (d *demo) eventually(ctx context.Context, f func() (bool, error)) error {
	deadline := time.Now().Add(patience)
	for {
		done, err := f()
		if err != nil || done || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("demo: %w", context.Cause(ctx))
		}
	}
}

func describe(s wire.Seen) string {
	text, err := json.Marshal(s)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n               ")
}

// A tapClient asks a tap that runs in the fabric's namespace.
type tapClient struct {
	ask     *os.File
	answers *bufio.Scanner
	ended   chan error
	out     *os.File
}

func (d *demo) tap(ctx context.Context) (*tapClient, error) {
	stdin, ask, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("demo: %w", err)
	}
	out, stdout, err := os.Pipe()
	if err != nil {
		stdin.Close()
		ask.Close()
		return nil, fmt.Errorf("demo: %w", err)
	}
	t := &tapClient{ask: ask, answers: bufio.NewScanner(out), ended: make(chan error, 1), out: out}
	go func() {
		code, err := d.lab.Exec(ctx, "fabric", []string{d.program, "lab", "tap", "--word", canary}, lab.Stdio{In: stdin, Out: stdout, Err: os.Stderr})
		stdin.Close()
		stdout.Close()
		if err == nil && code != 0 {
			err = fmt.Errorf("demo: tap: exit code %d", code)
		}
		t.ended <- err
	}()
	return t, nil
}

// reset returns what was seen since the last reset.
func (t *tapClient) reset() (wire.Seen, error) {
	var seen wire.Seen
	if _, err := fmt.Fprintln(t.ask, "reset"); err != nil {
		return seen, fmt.Errorf("demo: tap: %w", err)
	}
	t.out.SetReadDeadline(time.Now().Add(patience))
	if !t.answers.Scan() {
		select {
		case err := <-t.ended:
			return seen, fmt.Errorf("demo: tap ended: %w", err)
		default:
			return seen, fmt.Errorf("demo: tap: no answer: %w", t.answers.Err())
		}
	}
	if err := json.Unmarshal(t.answers.Bytes(), &seen); err != nil {
		return seen, fmt.Errorf("demo: tap: %w", err)
	}
	return seen, nil
}

func (t *tapClient) close() {
	t.ask.Close()
	<-t.ended
	t.out.Close()
}
