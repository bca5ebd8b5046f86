package hbone

import "strings"

// A ProxyError is an error type of the Proxy-Status header field,
// https://www.rfc-editor.org/rfc/rfc9209#section-2.3. The empty one is none.
type ProxyError string

// The error types that a refused CONNECT may carry.
const (
	DestinationNotFound     ProxyError = "destination_not_found"
	DestinationUnavailable  ProxyError = "destination_unavailable"
	DestinationIPProhibited ProxyError = "destination_ip_prohibited"
	DestinationIPUnroutable ProxyError = "destination_ip_unroutable"
	ConnectionRefused       ProxyError = "connection_refused"
	ConnectionTerminated    ProxyError = "connection_terminated"
	ConnectionTimeout       ProxyError = "connection_timeout"
	ConnectionLimitReached  ProxyError = "connection_limit_reached"
	TLSCertificateError     ProxyError = "tls_certificate_error"
	HTTPRequestError        ProxyError = "http_request_error"
	HTTPRequestDenied       ProxyError = "http_request_denied"
	HTTPProtocolError       ProxyError = "http_protocol_error"
	ProxyInternalError      ProxyError = "proxy_internal_error"
	ProxyConfigurationError ProxyError = "proxy_configuration_error"
)

// proxyName is how this proxy names itself in Proxy-Status.
const proxyName = "ztun"

// ProxyStatus returns the header's value that reports e.
func ProxyStatus(e ProxyError) string { return proxyName + "; error=" + string(e) }

// ParseProxyStatus returns the error type of a Proxy-Status field. Of several
// proxies the last one counts: "the first member of the list represents the
// intermediary closest to the origin server, and the last member represents
// the intermediary closest to the user agent" (section 2); a tunnel's peer is
// the only one that knows. Anything it cannot read is no error type.
func ParseProxyStatus(value string) ProxyError {
	member := value[lastMember(value):]
	for len(member) > 0 {
		var param string
		param, member = cutParam(member)
		if e, ok := strings.CutPrefix(strings.TrimSpace(param), "error="); ok && isToken(e) {
			return ProxyError(e)
		}
	}
	return ""
}

// lastMember returns where the last member of a list begins.
func lastMember(s string) int {
	at, quoted := 0, false
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ',' && !quoted:
			at = i + 1
		}
	}
	return at
}

// cutParam cuts s at the first semicolon that is not quoted.
func cutParam(s string) (param, rest string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ';' && !quoted:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

// isToken reports whether s is a token of the error registry's alphabet.
func isToken(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && c != '_' {
			return false
		}
	}
	return true
}
