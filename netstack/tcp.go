package netstack

import (
	"fmt"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// TCP chooses among what gVisor's TCP can do. The zero value is what figures
// speak for; the other choices are there to be measured.
type TCP struct {
	// RACK finds losses by the time that has passed (RFC 8985), and probes for
	// a lost tail.
	RACK bool
	// NoSACK does without selective acknowledgements.
	NoSACK bool
	// Pod and Network are the congestion controls of the two legs, "reno" or
	// "cubic". Default reno and reno.
	Pod, Network string
}

func (c TCP) withDefaults() TCP {
	if c.Pod == "" {
		c.Pod = "reno"
	}
	if c.Network == "" {
		c.Network = "reno"
	}
	return c
}

func (c TCP) validate() error {
	for _, name := range []string{c.Pod, c.Network} {
		if !slices.Contains([]string{"reno", "cubic"}, name) {
			return fmt.Errorf("netstack: there is no congestion control %q", name)
		}
	}
	return nil
}

// options are those of a stack.
func (c *TCP) options() []tcpip.SettableTransportProtocolOption {
	sack, recovery := tcpip.TCPSACKEnabled(!c.NoSACK), tcpip.TCPRecovery(0)
	if c.RACK {
		recovery = tcpip.TCPRACKLossDetection
	}
	control := tcpip.CongestionControlOption(c.Network)
	return []tcpip.SettableTransportProtocolOption{&sack, &recovery, &control}
}

// control sets what differs between the legs.
func (c *TCP) control(ep *tcp.Endpoint, pod bool) {
	if pod && c.Pod != c.Network {
		control := tcpip.CongestionControlOption(c.Pod)
		ep.SetSockOpt(&control)
	}
}
