package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// maxRequest bounds a request on the control socket, in bytes.
const maxRequest = 128 << 10

// A request is what a client asks of a lab: one a connection, one packet of
// JSON, together with the client's standard input, output and error. Status
// and logs are written to the output.
type request struct {
	Op     string   `json:"op"`               // exec, logs, status, kill, start, down
	Target string   `json:"target,omitempty"` // A pod or a process.
	Argv   []string `json:"argv,omitempty"`
	Follow bool     `json:"follow,omitempty"`
	Signal int      `json:"signal,omitempty"`
	Hold   bool     `json:"hold,omitempty"`
}

// A signalling message may follow an exec request.
type signalling struct {
	Signal int `json:"signal"`
}

// A reply is the answer to a request.
type reply struct {
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"` // Of exec: what the command ended with.
}

// Status is a lab as seen from outside.
type Status struct {
	Name    string          `json:"name"`
	Dir     string          `json:"dir"`
	Config  string          `json:"config"`            // What the control plane reads, the lab's own file and any other.
	Problem string          `json:"problem,omitempty"` // Why the directory as it is now is not in force.
	Control ProcessStatus   `json:"control"`
	Nodes   []NodeStatus    `json:"nodes"`
	Pods    []PodStatus     `json:"pods"`
	Service []ServiceStatus `json:"services"`
}

// NodeStatus is one node.
type NodeStatus struct {
	Name      string        `json:"name"`
	Addresses []netip.Addr  `json:"addresses"`
	Proxy     ProcessStatus `json:"proxy"`
	// CapEff is the proxy's effective capabilities, as /proc shows them.
	CapEff string        `json:"capEff,omitempty"`
	Attach ProcessStatus `json:"attach"`
}

// PodStatus is one pod.
type PodStatus struct {
	Namespace  string          `json:"namespace"`
	Name       string          `json:"name"`
	Node       string          `json:"node"`
	Addresses  []netip.Addr    `json:"addresses"`
	Enrolled   bool            `json:"enrolled"`
	Phase      string          `json:"phase,omitempty"`
	Error      string          `json:"error,omitempty"`
	Containers []ProcessStatus `json:"containers"`
	// Netns is the path of its network namespace, for those who are run at
	// node/NAME, control or fabric.
	Netns string `json:"netns"`
}

// ServiceStatus is one service.
type ServiceStatus struct {
	Hostname  string       `json:"hostname"`
	Addresses []netip.Addr `json:"addresses"`
}

// send writes v as one packet, with descriptors.
func send(conn *net.UnixConn, v any, files ...*os.File) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if len(text) > maxRequest {
		return fmt.Errorf("lab: a message of %d bytes is too long", len(text))
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := conn.WriteMsgUnix(text, rights, nil); err != nil {
		return fmt.Errorf("lab: control socket: %w", err)
	}
	return nil
}

// receive reads one packet into v, and the descriptors that came with it,
// which are the caller's even with an error.
func receive(conn *net.UnixConn, v any) ([]*os.File, error) {
	text := make([]byte, maxRequest+1)
	rights := make([]byte, unix.CmsgSpace(3*4))
	n, rightsLen, flags, _, err := conn.ReadMsgUnix(text, rights)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	if messages, err := unix.ParseSocketControlMessage(rights[:rightsLen]); err == nil {
		for i := range messages {
			fds, err := unix.ParseUnixRights(&messages[i])
			if err != nil {
				continue
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				files = append(files, os.NewFile(uintptr(fd), "client"))
			}
		}
	}
	if n == 0 {
		return files, net.ErrClosed
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > maxRequest {
		return files, errors.New("lab: message too long")
	}
	if err := json.Unmarshal(text[:n], v); err != nil {
		return files, fmt.Errorf("lab: message: %w", err)
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
