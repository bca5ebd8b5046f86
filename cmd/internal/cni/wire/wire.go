// Package wire is what the CNI plugin and the node agent have to agree on: the
// plugin's entry in the chain, which the agent writes, and the one request
// that the plugin makes.
package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
)

const (
	// PluginType names the plugin's binary and its entry in the chain.
	PluginType = "ztun-cni"
	// StockType is that of Istio's own plugin. Both would capture the same
	// pods.
	StockType = "istio-cni"
	// SocketName is the agent's socket in its run directory.
	SocketName = "pluginevent.sock"
	// AddPath is where on the socket a new pod is told of, by POST.
	AddPath = "/cmdadd"
	// AgentPodPrefix begins the names of the agent's own pods, which cannot
	// wait for the agent.
	AgentPodPrefix = "istio-cni-node-"

	// MaxEvent bounds an Event, in bytes of JSON.
	MaxEvent = 64 << 10
	maxIPs   = 64
	maxName  = 253
)

// Conf is the plugin's entry in the chain. What the runtime adds to it
// (cniVersion, name, prevResult) is not here.
type Conf struct {
	Type string `json:"type"`
	// RunDir is the agent's run directory, as the host sees it.
	RunDir string `json:"cni_agent_run_dir"`
	// PodNamespace is where the agent's own pods are.
	PodNamespace string `json:"pod_namespace"`
	// ExcludeNamespaces are never in the mesh. Their pods start without the
	// agent: what the cluster itself runs must not wait for it.
	ExcludeNamespaces []string `json:"exclude_namespaces,omitempty"`
	// WrappedFrom is the file name of the single configuration that the list
	// around this entry was made of; "": it was a list.
	WrappedFrom string `json:"wrapped_from,omitempty"`
	// Owned says that the whole list is the agent's, a copy of another.
	Owned bool `json:"owned_list,omitempty"`
}

// An Event tells the agent of a new pod.
type Event struct {
	Netns        string // Path on the host.
	PodName      string
	PodNamespace string
	PodUID       string `json:",omitempty"` // Older runtimes do not say it.
	IPs          []IP
}

// IP is an address that the chain gave to the pod.
type IP struct {
	Interface *int `json:",omitempty"` // Index into the chain's interfaces.
	Address   netip.Prefix
	Gateway   netip.Addr `json:",omitzero"`
}

// Decode reads the one Event that text holds.
func Decode(text []byte) (Event, error) {
	var e Event
	if len(text) > MaxEvent {
		return Event{}, fmt.Errorf("more than %d bytes", MaxEvent)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	if err := dec.Decode(&e); err != nil {
		return Event{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Event{}, errors.New("something follows the JSON object")
	}
	return e, e.Validate()
}

// Validate says everything that is missing or wrong.
func (e *Event) Validate() error {
	var errs []error
	if !filepath.IsAbs(e.Netns) || filepath.Clean(e.Netns) != e.Netns || len(e.Netns) > 4096 {
		errs = append(errs, fmt.Errorf("path Netns %.100q is not clean and absolute", e.Netns))
	}
	for _, n := range []struct {
		field, value string
		required     bool
	}{{"PodName", e.PodName, true}, {"PodNamespace", e.PodNamespace, true}, {"PodUID", e.PodUID, false}} {
		if n.value == "" && !n.required {
			continue
		}
		if !validName(n.value) {
			errs = append(errs, fmt.Errorf("%s %.100q is not a name", n.field, n.value))
		}
	}
	if len(e.IPs) > maxIPs {
		errs = append(errs, fmt.Errorf("%d IPs are more than %d", len(e.IPs), maxIPs))
	}
	for i, ip := range e.IPs[:min(len(e.IPs), maxIPs)] {
		if !ip.Address.IsValid() {
			errs = append(errs, fmt.Errorf("IPs[%d] has no Address", i))
		}
	}
	return errors.Join(errs...)
}

// validName takes the letters of Kubernetes' names and UIDs.
func validName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		default:
			return false
		}
	}
	return true
}
