// Package owner is what the node's proxies ask the node agent about TCP
// connections that come from the node: which process, if any, opened this one?
// A kubelet's probe passes a pod's policies; what only looks like one does not.
//
// Questions go over a unix seqpacket socket of their own, since discovery
// (package zds) allows nothing that is not an answer. Each is one packet, and so
// is each answer:
//
//	question  version 1, node's address (16) and port (2), pod's address (16)
//	          and port (2), UID of the pod (1 to 253)
//	answer    version 1, an Owner or 255: it cannot be said
//
// Numbers are big endian, and IPv4 addresses mapped into IPv6. Whoever breaks
// this is hung up on. Client is the proxy's side, Server the agent's; both are safe for
// concurrent use.
package owner

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// SocketName is the file of the socket, beside that of discovery.
const SocketName = "ztun-owner.sock"

// Owner says who owns a TCP socket of the host.
type Owner int

const (
	// None: no process of the host's network namespace does. It is traffic of
	// somebody else under the host's address (kube-proxy's masquerading), or the
	// socket is gone.
	None Owner = iota
	// Local: some process of the host that is not the kubelet.
	Local
	// Kubelet: the kubelet.
	Kubelet
	// Unknown: a process of the host, and it cannot be told which.
	Unknown
)

func (o Owner) String() string {
	switch o {
	case None:
		return "none"
	case Local:
		return "local"
	case Kubelet:
		return "kubelet"
	case Unknown:
		return "unknown"
	}
	return fmt.Sprintf("Owner(%d)", int(o))
}

// MayProbe says whether a connection with such an owner is a kubelet's probe: a
// local process owns it and, where that can be told, it is the kubelet.
func (o Owner) MayProbe() bool { return o == Kubelet || o == Unknown }

// A Question asks about one connection.
type Question struct {
	// Node is the end that opened it, App the one in the pod.
	Node, App netip.AddrPort
	// Pod is the pod's UID.
	Pod string
}

const (
	version = 1
	// uidAt is where the UID begins, maxUID its length at most, in bytes.
	uidAt       = 1 + 2*(16+2)
	maxUID      = 253
	maxQuestion = uidAt + maxUID
	answerLen   = 2
	// cannotSay is the answer of an agent that has none.
	cannotSay = 255
)

var (
	errQuestion = errors.New("owner: not a question")
	errAnswer   = errors.New("owner: not an answer")
)

// append encodes q.
func (q Question) append(b []byte) ([]byte, error) {
	if len(q.Pod) == 0 || len(q.Pod) > maxUID || !q.Node.Addr().IsValid() || !q.App.Addr().IsValid() {
		return nil, errQuestion
	}
	b = append(b, version)
	for _, end := range []netip.AddrPort{q.Node, q.App} {
		a := end.Addr().As16()
		b = append(b, a[:]...)
		b = binary.BigEndian.AppendUint16(b, end.Port())
	}
	return append(b, q.Pod...), nil
}

// parseQuestion decodes what append made.
func parseQuestion(b []byte) (q Question, err error) {
	if len(b) <= uidAt || len(b) > maxQuestion || b[0] != version {
		return q, errQuestion
	}
	end := func(b []byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b)).Unmap(), binary.BigEndian.Uint16(b[16:]))
	}
	q = Question{Node: end(b[1:]), App: end(b[19:]), Pod: string(b[uidAt:])}
	if q.Node.Addr().Is4() != q.App.Addr().Is4() {
		return Question{}, errQuestion
	}
	return q, nil
}

// parseAnswer decodes an answer.
func parseAnswer(b []byte) (Owner, error) {
	if len(b) != answerLen || b[0] != version {
		return None, errAnswer
	}
	if b[1] == cannotSay {
		return None, ErrAway
	}
	o := Owner(b[1])
	if o > Unknown {
		return None, errAnswer
	}
	return o, nil
}
