package netstack

// Refusal says how a connection that is not accepted looks to the app that
// asked for it.
type Refusal uint8

const (
	// RefuseReset answers the SYN with a RST: ECONNREFUSED.
	RefuseReset Refusal = iota
	// RefuseUnreachable answers with ICMP host unreachable: EHOSTUNREACH.
	RefuseUnreachable
	// RefuseProhibited answers with ICMP administratively prohibited: EHOSTUNREACH
	// on Linux for IPv4, EACCES for IPv6.
	RefuseProhibited
	// RefuseSilent answers nothing; the app's own retries run into ETIMEDOUT.
	RefuseSilent
)
