// Package agent is the privileged half of a node: it attaches a TUN device to
// each pod that is wanted in the mesh, keeps the pod's rules and routes as
// they must be, and hands the device to the node's proxy over ZDS.
//
// It does not know Kubernetes. Whoever does calls Set and Delete:
//
//	a, err := agent.New(agent.Config{StateDir: "/var/run/ztun", Socket: "/var/run/ztunnel/ztunnel.sock", Log: log})
//	go a.Run(ctx)
//	a.Set(agent.Pod{UID: "...", Netns: "/var/run/netns/..."})
//
// All methods may be called from any goroutine.
package agent

import (
	"context"
	"log/slog"
	"net/netip"
)

// A Pod is a pod that is wanted in the mesh.
type Pod struct {
	UID            string `json:"uid"`
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	// Netns is the path of the pod's network namespace. It need not stay
	// valid: the agent holds the namespace open while it runs.
	Netns string `json:"netns"`
	// Addresses are the pod's own. Empty: those found on its interfaces.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// BypassInbound leaves plaintext that comes to the pod alone.
	BypassInbound bool `json:"bypassInbound,omitempty"`
	// DNSCapture hands the pod's UDP to port 53 to the proxy.
	DNSCapture bool `json:"dnsCapture,omitempty"`
	// VirtualInterfaces are those of the pod's interfaces whose traffic comes
	// from others than the pod's processes (virtual machines, containers in
	// it), and is captured as outbound.
	VirtualInterfaces []string `json:"virtualInterfaces,omitempty"`
	// ProbePorts are the TCP ports that the kubelet probes.
	ProbePorts []uint16 `json:"probePorts,omitempty"`
}

// Config is what an Agent needs. The zero value of a field is the default
// named on it.
type Config struct {
	// StateDir keeps what was done to each pod, so that a restarted agent
	// resumes. Required; made with mode 0700.
	StateDir string
	// Socket is where proxies connect. Required.
	Socket string
	// SocketUID and SocketGID own the socket, which has mode 0600. Zero: the
	// agent's own.
	SocketUID, SocketGID int
	// NodeAddresses are the node's own, from which the kubelet probes.
	NodeAddresses []netip.Addr
	// Log takes what the agent has to say. Nil: nothing is logged.
	Log *slog.Logger
}

// Status is what an Agent knows of one pod.
type Status struct {
	Pod       Pod          `json:"pod"`
	Phase     Phase        `json:"phase"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	MTU       uint32       `json:"mtu,omitempty"`
	// Held says that the agent has the device open itself; otherwise a proxy
	// that an earlier agent gave it to holds it.
	Held bool `json:"held"`
	// Repairs counts what had to be put back in the pod.
	Repairs uint64 `json:"repairs,omitempty"`
	// Error is why the pod is not further.
	Error string `json:"error,omitempty"`
}

// Phase is how far a pod has come.
type Phase string

const (
	// Attaching: the pod's plumbing is not in place; the pod has no mesh.
	Attaching Phase = "attaching"
	// Attached: captured, but no proxy has the device. TCP goes nowhere.
	Attached Phase = "attached"
	// Served: a proxy has taken the device.
	Served Phase = "served"
	// Detaching: being undone.
	Detaching Phase = "detaching"
)

// An Agent attaches pods and serves their devices to proxies.
type Agent struct {
	cfg Config
}

// New opens the state of an earlier agent. Run starts the work.
func New(cfg Config) (*Agent, error) { return &Agent{cfg: cfg}, nil }

// Run serves proxies and works on pods until ctx ends. It leaves every pod as
// it is: captured, so that nothing leaves it in plain text.
func (a *Agent) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// Set wants p in the mesh, as it says now. It does not wait.
func (a *Agent) Set(p Pod) error { return nil }

// Delete wants the pod out of the mesh, and waits until its plumbing is gone
// or ctx ends. An unknown uid is no error.
func (a *Agent) Delete(ctx context.Context, uid string) error { return nil }

// Wait returns once the pod has reached Served, or with the reason why it has
// not when ctx ends.
func (a *Agent) Wait(ctx context.Context, uid string) error { return nil }

// Status tells of every pod, in the order of their UIDs.
func (a *Agent) Status() []Status { return nil }
