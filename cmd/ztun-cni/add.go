package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

const (
	// budget is how long the agent may take. Runtimes give a chain minutes; the
	// kubelet tries again, and other pods should not wait behind this one.
	budget = 5 * time.Second
	// maxAnswer bounds what is read of the agent's answer, in bytes.
	maxAnswer = 4 << 10
)

// conf is what comes in on stdin: our entry, and what the runtime added.
type conf struct {
	wire.Conf
	CNIVersion string          `json:"cniVersion"`
	PrevResult json.RawMessage `json:"prevResult"`
}

// podArgs are what runtimes tell of the pod in CNI_ARGS.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAME      types.UnmarshallableString // CNI finds the fields by these names.
	K8S_POD_NAMESPACE types.UnmarshallableString
	K8S_POD_UID       types.UnmarshallableString
}

// add lets the pod start, by printing the chain's result as it is, or says why
// not.
func add(args *skel.CmdArgs, out io.Writer) error {
	var c conf
	if err := json.Unmarshal(args.StdinData, &c); err != nil {
		return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("ztun-cni: configuration on stdin: %v", err), "")
	}
	ips, result, err := c.result()
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("ztun-cni: configuration on stdin: prevResult: %v", err), "")
	}
	pod := podArgs{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(args.Args, &pod); err != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("ztun-cni: CNI_ARGS: %v", err), "")
	}
	e := wire.Event{
		Netns: filepath.Clean(args.Netns), IPs: ips,
		PodName: string(pod.K8S_POD_NAME), PodNamespace: string(pod.K8S_POD_NAMESPACE), PodUID: string(pod.K8S_POD_UID),
	}
	if c.asks(&e) {
		if err := ask(c.RunDir, &e); err != nil {
			return err
		}
	}
	if _, err := out.Write(result); err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("ztun-cni: print the result: %v", err), "")
	}
	return nil
}

// asks says whether the agent is to be asked.
func (c *conf) asks(e *wire.Event) bool {
	switch {
	case e.PodName == "" && e.PodNamespace == "":
		return false // Not a pod: somebody uses the node's chain for a container of their own.
	case e.PodNamespace == c.PodNamespace && strings.HasPrefix(e.PodName, wire.AgentPodPrefix):
		return false // The agent, which cannot answer before it has started.
	}
	return !slices.Contains(c.ExcludeNamespaces, e.PodNamespace)
}

// result returns the pod's addresses, and what to print. That is the chain's
// result untouched: it may say more than this program knows of.
func (c *conf) result() ([]wire.IP, []byte, error) {
	if len(c.PrevResult) == 0 || string(c.PrevResult) == "null" {
		text, err := json.Marshal(map[string]string{"cniVersion": c.CNIVersion})
		return nil, text, err
	}
	parsed := types.PluginConf{CNIVersion: c.CNIVersion}
	if err := json.Unmarshal(c.PrevResult, &parsed.RawPrevResult); err != nil {
		return nil, nil, err
	}
	if err := version.ParsePrevResult(&parsed); err != nil {
		return nil, nil, err
	}
	res, err := current.NewResultFromResult(parsed.PrevResult)
	if err != nil {
		return nil, nil, err
	}
	var ips []wire.IP
	for _, ip := range res.IPs {
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		ones, bits := ip.Address.Mask.Size()
		if !ok || bits == 0 {
			return nil, nil, fmt.Errorf("%v is not an address with a prefix", ip.Address)
		}
		gateway, _ := netip.AddrFromSlice(ip.Gateway)
		ips = append(ips, wire.IP{Interface: ip.Interface, Address: netip.PrefixFrom(addr.Unmap(), ones), Gateway: gateway.Unmap()})
	}
	return ips, c.PrevResult, nil
}

// ask makes the one request. Nil: the pod may start.
func ask(runDir string, e *wire.Event) error {
	if err := e.Validate(); err != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("ztun-cni: what the runtime says of the pod: %v", err), "")
	}
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), budget, fmt.Errorf("no answer within %v", budget))
	defer cancel()
	socket := filepath.Join(runDir, wire.SocketName)
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+wire.AddPath, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op
		}
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return types.NewError(types.ErrTryAgainLater, fmt.Sprintf(
			"ztun-cni: pod %s/%s has to wait for the node agent (DaemonSet istio-cni-node): %v", e.PodNamespace, e.PodName, err), "")
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode != http.StatusOK {
		return types.NewError(types.ErrTryAgainLater, fmt.Sprintf(
			"ztun-cni: pod %s/%s: the node agent says %d: %s", e.PodNamespace, e.PodName, resp.StatusCode, printable(answer)), "")
	}
	return nil
}

// printable keeps an answer from disturbing the line that it becomes part of.
func printable(answer []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return ' '
		}
		return r
	}, strings.TrimSpace(string(answer)))
}
